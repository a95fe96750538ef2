"""`scalabl train`: trains an adapter on labelled rows. The training loop is in `scalabl`."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from scalabl.config import TaskKind
from scalabl.training.recipe import TrainingConfig
from scalabl_server.cli.shared.labelled_data import ROWS_HELP, LabelColumn, TextColumn, columns_of, training_examples, warn
from scalabl_server.cli.shared.options import (
    SpecialTokens,
    command_for,
    given_labels,
    own_head_task,
    split,
    task_of,
    usage_errors,
)

if TYPE_CHECKING:
    from scalabl.prompt import Prompter


def _train(
    recipe: TrainingConfig,
    model: Annotated[str, typer.Option(help="Base model: a hub id or a folder.")],
    train: Annotated[str, typer.Option(help=f"Training rows: {ROWS_HELP}.")],
    validation: Annotated[str, typer.Option(help="Validation rows, in a form as for --train.")],
    output: Annotated[Path, typer.Option(help="The adapter directory to write. The same run resumes from it.")],
    text_column: TextColumn = None,
    label_column: LabelColumn = None,
    labels: Annotated[
        Path | None,
        typer.Option(
            help="File of all labels in order: one per line, or a JSON list (.json). Default: those of --train, sorted."
        ),
    ] = None,
    label: Annotated[
        list[str] | None, typer.Option(help="A label, instead of --labels. Repeat it for each, in order.")
    ] = None,
    kind: Annotated[
        TaskKind, typer.Option(help="classification: fixed choices; multiple_choice: choices come with each input.")
    ] = "classification",
    template: Annotated[
        str | None, typer.Option(help="Prompt template with {input} and, for multiple choice, {choices}.")
    ] = None,
    head: Annotated[
        Literal["vocabulary", "fresh"],
        typer.Option(
            help="vocabulary: each choice has a token, and its row of the base model's head is used. fresh: each choice "
            "has a new row, N(0, initializer_range^2) at first, trained too; for labels whose words mean nothing."
        ),
    ] = "vocabulary",
    chat: Annotated[bool, typer.Option(help="Wrap the prompt in the tokenizer's chat template.")] = False,
    choice_prefix: Annotated[
        str | None, typer.Option(help="Text between prompt and choice (default: a space, or nothing with --chat).")
    ] = None,
    special_tokens_in_text: SpecialTokens = "text",
    r: Annotated[
        int | None, typer.Option(help="LoRA rank: the number of stochastic scalars per adapted layer.  \\[default: 8]")
    ] = None,
    lora_alpha: Annotated[float | None, typer.Option(help="LoRA alpha: the scaling is alpha / r.  \\[default: 16]")] = None,
    target_modules: Annotated[
        str | None,
        typer.Option(
            help="Comma-separated names of the modules to adapt; all-linear for every linear layer but the head; or a "
            "regular expression for whole names, as in PEFT.  \\[default: q_proj,v_proj,lm_head]"
        ),
    ] = None,
    layers_to_transform: Annotated[
        str | None, typer.Option(help="Comma-separated indices of the layers to adapt (default: all).")
    ] = None,
    members: Annotated[
        int,
        typer.Option(
            min=1, help="Members of a mixture: runs with the seeds --seed, --seed + 1, … in <output>/members, then combined."
        ),
    ] = 1,
    init_from: Annotated[
        Path | None,
        typer.Option(
            help="Start from a PEFT LoRA directory. Each standard deviation starts at up to --std-init times its mean."
        ),
    ] = None,
    prior_std: Annotated[float, typer.Option(help="Standard deviation of the prior p(s).")] = 1.0,
    base_model_name: Annotated[str | None, typer.Option(help="Name to record in the adapter (default: --model).")] = None,
    device: Annotated[str, typer.Option(help="Device of the model: cpu, cuda, … (auto: a GPU if there is one).")] = "auto",
    overwrite: Annotated[bool, typer.Option(help="Remove another run's adapter and checkpoints in --output.")] = False,
) -> None:
    """Train an adapter with stochastic variational inference."""
    for option, value in (
        ("--r", r),
        ("--lora-alpha", lora_alpha),
        ("--target-modules", target_modules),
        ("--layers-to-transform", layers_to_transform),
    ):
        if init_from is not None and value is not None:
            raise typer.BadParameter("the LoRA of --init-from sets this value; leave the option out", param_hint=option)
    targets = target_modules or "q_proj,v_proj,lm_head"
    from scalabl.base.pretrained import load_pretrained, load_skeleton, longest_prompt
    from scalabl.base.targets import is_pattern, targets_of
    from scalabl.config import AdapterConfig
    from scalabl.evaluation.encoded import encode_examples
    from scalabl.files.peft_import import adapter_of, read_peft
    from scalabl.prompt import Prompter
    from scalabl.training.members import train_members
    from scalabl.training.run_folder import Origin, TrainingRun, find_run, recorded_chat_date
    from scalabl.training.trainer import StartingPoint, train_adapter

    if layers_to_transform is not None and is_pattern(targets):
        raise typer.BadParameter(
            f"--target-modules {targets} chooses the layers itself; leave this option out",
            param_hint="--layers-to-transform",
        )
    lora = read_peft(init_from) if init_from is not None else None
    columns, given = columns_of(text_column, label_column), given_labels(labels, label) if labels or label else None
    if lora is not None and lora.head is not None:
        given = given or lora.labels
        if given is None:
            raise typer.BadParameter("name the classes of the LoRA's head, in the order of its rows", param_hint="--label")
    data = training_examples(kind, train, validation, columns, given)
    chat_date = recorded_chat_date(output) if chat and not overwrite else None
    with usage_errors():
        task = (
            task_of(kind, template, chat, choice_prefix, data.choices, special_tokens_in_text, chat_date=chat_date)
            if head == "vocabulary"
            else own_head_task(template, chat, data.choices, special_tokens_in_text, kind, chat_date)
        )
        config = AdapterConfig(
            base_model_name_or_path=base_model_name or model,
            r=8 if r is None else r,
            lora_alpha=16.0 if lora_alpha is None else lora_alpha,
            target_modules=(targets,) if is_pattern(targets) else split(targets),
            layers_to_transform=split(layers_to_transform) if layers_to_transform else None,
            prior_std=prior_std,
            task=task,
        )
    skeleton, tokenizer = load_skeleton(model)
    prompter, max_tokens = Prompter(config.task, tokenizer), longest_prompt(skeleton.config, tokenizer)
    modules = targets_of(skeleton, targets if is_pattern(targets) else config.target_modules) if lora is None else ()
    resolved = {"task": prompter.resolved_task, "target_modules": modules}
    config, start = config.model_copy(update=resolved), None
    if lora is not None:
        recorded = {"base_model_name_or_path": config.base_model_name_or_path, "prior_std": prior_std}
        config, tensors = adapter_of(lora, skeleton, config.task, **recorded)
        start = StartingPoint(tensors, Origin(name=str(init_from), sha256=lora.sha256))
    training_set, validation_set = (encode_examples(prompter, rows, max_tokens) for rows in (data.training, data.validation))
    if members > 1:
        with usage_errors():
            config = AdapterConfig.model_validate({**config.model_dump(), "members": members, "format_version": 2})
    origin = None if start is None else start.origin
    planned = TrainingRun.of(config, recipe, training_set, validation_set, origin)
    # Refuses another run's folder before the base model is loaded.
    if find_run(output, planned, overwrite=overwrite) is None:
        warn(*data.warnings)
    if head == "vocabulary":
        _show_tokens(prompter)
    pretrained = load_pretrained(model, device=device, dtype="float32")
    run = partial(train_members, on_member=partial(_announce, members)) if members > 1 else train_adapter
    trained = run(pretrained.model, config, recipe, training_set, validation_set, output, start, overwrite=overwrite)
    if trained.was_finished:
        typer.echo(f"{output} holds this run's finished adapter; nothing was done")
    else:
        typer.echo(json.dumps(trained.metrics))


def _show_tokens(prompter: Prompter) -> None:
    """Print on standard error which token stands for each choice."""
    shown = zip(prompter.task.choices, prompter.token_texts, prompter.choice_tokens, strict=True)
    typer.echo("token of each choice: " + ", ".join(f"{c!r}: {text!r} ({token})" for c, text, token in shown), err=True)


def _announce(members: int, member: int, folder: Path) -> None:
    typer.echo(f"member {member + 1} of {members}: {folder}", err=True)


train = command_for(TrainingConfig, _train)
