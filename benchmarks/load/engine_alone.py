"""The server's engine without the server, in a process of its own that computes only when it is asked.

`engine_alone` starts the process, which runs this module.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from benchmarks.load.workload import Workload


@contextmanager
def engine_alone(workload: Workload, budget: int) -> Iterator[Callable[[Sequence[str]], float]]:
    """A function from prompts to the seconds that the engine takes for them, in passes of up to so many tokens."""
    command = [sys.executable, "-m", "benchmarks.load.engine_alone", "--budget", str(budget)]
    command += ["--model", workload.model, "--samples", str(workload.num_samples)]
    command += [] if workload.adapter is None else ["--adapter", str(workload.adapter)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def run(prompts: Sequence[str]) -> float:
        assert process.stdin is not None  # pipes were asked for
        assert process.stdout is not None
        process.stdin.write(json.dumps(list(prompts)) + "\n")
        process.stdin.flush()
        return float(json.loads(process.stdout.readline()))

    try:
        run(["warm up"])
        yield run
    finally:
        process.kill()
        process.wait()


def main() -> None:
    """Read a list of prompts from each line of standard input, and print the seconds that the engine takes for them."""
    from scalabl_server.batching.jobs import SampledJob
    from scalabl_server.engines.load import load_engine
    from scalabl_server.settings import ServeSettings

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--adapter", type=Path)
    parser.add_argument("--samples", type=int, required=True)
    parser.add_argument("--budget", type=int, required=True, help="tokens of a pass, over all samples")
    options = parser.parse_args()
    settings = Workload(options.model, options.adapter, options.samples).settings
    engine = load_engine(ServeSettings(**settings, target_batch_tokens=options.budget))
    served = engine.adapter(None)
    job = SampledJob(served.draws(options.samples, engine.settings.seed), len(served.config.task.choices))
    for line in sys.stdin:
        sequences = sorted((served.prompter.encode(text) for text in json.loads(line)), key=len)
        batches: list[list[list[int]]] = []
        for ids in sequences:  # ascending, so that each is its pass's longest
            if not batches or (len(batches[-1]) + 1) * options.samples * len(ids) > options.budget:
                batches.append([])
            batches[-1].append(ids)
        began = time.perf_counter()
        for batch in batches:
            engine.run([served] * len(batch), batch, [job] * len(batch))
        print(json.dumps(time.perf_counter() - began), flush=True)


if __name__ == "__main__":
    main()
