"""`scalabl convert`: makes adapters from other projects' checkpoints. `export` does the opposite."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Annotated

import typer

from scalabl.config import TaskKind
from scalabl_server.cli.shared.options import (
    SpecialTokens,
    given_labels,
    own_head_task,
    split,
    task_of,
    usage_errors,
)

convert = typer.Typer(help="Make an adapter directory from another project's checkpoint.", no_args_is_help=True)

Output = Annotated[Path, typer.Option(help="The adapter directory to write.")]
Kind = Annotated[
    TaskKind, typer.Option(help="classification: fixed choices; multiple_choice: choices come with each input.")
]
Chat = Annotated[bool, typer.Option(help="Wrap the prompt in the tokenizer's chat template.")]
ChoicePrefix = Annotated[
    str | None, typer.Option(help="Text between prompt and choice (default: a space, or nothing with --chat).")
]
Label = Annotated[
    list[str] | None,
    typer.Option("--label", "--choices", help="A choice. Repeat it for each, in order; a comma is a part of the choice."),
]
Labels = Annotated[
    Path | None, typer.Option(help="File of the choices, instead of --label: one per line, or a JSON list (.json).")
]

Overwrite = Annotated[bool, typer.Option(help="Replace the adapter in --output, once the new one is complete.")]


@convert.command("bayesadapt")
def convert_bayesadapt_command(
    checkpoint: Annotated[
        Path, typer.Option(help="The state_dict.pt that BayesAdapt saved. It is read without running pickled code.")
    ],
    base_model: Annotated[str, typer.Option(help="Name of the base model to record in the adapter.")],
    lora_alpha: Annotated[float, typer.Option(help="LoRA alpha of the training run.")],
    choice_tokens: Annotated[str, typer.Option(help="Comma-separated token ids, one per choice.")],
    output: Output,
    label: Label = None,
    labels: Labels = None,
    kind: Kind = "multiple_choice",
    template: Annotated[
        str | None, typer.Option(help="Prompt template (default: BayesAdapt's multiple-choice prompt).")
    ] = None,
    chat: Chat = False,
    choice_prefix: ChoicePrefix = None,
    special_tokens_in_text: SpecialTokens = "text",
    overwrite: Overwrite = False,
) -> None:
    """Convert a ScalaBL checkpoint of BayesAdapt, the published code of the paper's authors."""
    from scalabl.files.bayesadapt import convert_bayesadapt

    choices = given_labels(labels, label)
    today = datetime.date.today() if chat else None
    with usage_errors():
        task = task_of(kind, template, chat, choice_prefix, choices, special_tokens_in_text, split(choice_tokens), today)
    config = convert_bayesadapt(
        checkpoint, output, base_model=base_model, lora_alpha=lora_alpha, task=task, overwrite=overwrite
    )
    typer.echo(f"wrote {output}: rank {config.r}, target modules {', '.join(config.target_modules)}")


@convert.command("peft")
def convert_peft_command(
    peft: Annotated[Path, typer.Option(help="The LoRA directory that PEFT saved.")],
    model: Annotated[str, typer.Option(help="Base model of the LoRA. Only its tokenizer and tensor shapes are read.")],
    output: Output,
    label: Label = None,
    labels: Labels = None,
    kind: Kind = "classification",
    template: Annotated[
        str | None,
        typer.Option(
            help="Prompt template that the LoRA was trained with (with a classification head: {input}, the bare text)."
        ),
    ] = None,
    chat: Chat = False,
    choice_prefix: ChoicePrefix = None,
    special_tokens_in_text: SpecialTokens = "text",
    relative_sigma: Annotated[
        float,
        typer.Option(
            min=1e-6, help="Posterior standard deviation, as a fraction of each mean. `scalabl calibrate` rescales it."
        ),
    ] = 0.1,
    base_model_name: Annotated[str | None, typer.Option(help="Name to record in the adapter (default: --model).")] = None,
    overwrite: Overwrite = False,
) -> None:
    """Make a finished PEFT LoRA Bayesian: the posterior mean is exactly the LoRA's own weight update.

    A LoRA for sequence classification (task_type SEQ_CLS) is taken with its head. Its labels are those of id2label in the
    LoRA's config.json or in the base model's, unless they are given.
    """
    from scalabl.base.pretrained import load_skeleton
    from scalabl.files.peft_head import class_names
    from scalabl.files.peft_import import convert_peft, read_peft
    from scalabl.prompt import Prompter

    lora = read_peft(peft)
    skeleton, tokenizer = load_skeleton(model)
    choices = None
    if lora.head is not None and not labels and not label:
        choices = lora.labels or class_names(skeleton.config.to_dict(), len(lora.head))
    choices = choices or given_labels(labels, label)
    with usage_errors():
        if lora.head is None:
            task = task_of(kind, template, chat, choice_prefix, choices, special_tokens_in_text)
        else:
            task = own_head_task(template or "{input}", chat, choices, special_tokens_in_text)
    config = convert_peft(
        peft,
        output,
        skeleton,
        base_model=base_model_name or model,
        task=Prompter(task, tokenizer).resolved_task,
        relative_std=relative_sigma,
        overwrite=overwrite,
    )
    typer.echo(f"wrote {output}: rank {config.r}, target modules {', '.join(config.target_modules)}")
