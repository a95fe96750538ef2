"""Every setting is a flag and an environment variable."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import typer
from pydantic import BaseModel, Field, ValidationError
from scalabl_server.cli.main import app
from scalabl_server.cli.shared.options import command_for
from scalabl_server.settings import ServeSettings
from typer.testing import CliRunner

from scalabl import __version__


def test_every_setting_is_a_flag_with_its_variable_and_a_text() -> None:
    help_text = CliRunner().invoke(app, ["serve", "--help"], env={"COLUMNS": "300"}).stdout
    for name, field in ServeSettings.model_fields.items():
        assert f"--{name.replace('_', '-')} " in help_text
        assert f"SCALABL_{name.upper()}" in help_text
        assert field.description


def test_the_environment_sets_and_arguments_win(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCALABL_ADAPTER", "/from/environment")
    monkeypatch.setenv("SCALABL_PORT", "1234")
    settings = ServeSettings(port=99)
    assert settings.adapter == Path("/from/environment")
    assert settings.port == 99
    assert ServeSettings().port == 1234


@pytest.mark.parametrize(
    ("arguments", "environment", "said"),
    [
        (["--port", "70000"], {}, "Invalid value for --port: Input should be less than or equal to 65535 (got 70000)"),
        (["--dtype", "int8"], {}, "Invalid value for --dtype: Input should be 'auto', 'float32'"),
        (["--draw-scheme", "halton"], {}, "Invalid value for --draw-scheme"),
        (["--num-samples", "0"], {}, "Invalid value for --num-samples"),
        (["--num-samples", "many"], {}, "Invalid value for '--num-samples'"),
        ([], {"SCALABL_MAX_QUEUE": "0"}, "Invalid value for --max-queue"),
        (["--adapters", "a=x,b"], {}, "Invalid value for --adapters: 'b' has no folder; write name=folder"),
        (["--adapters", "a/b=x"], {}, "Invalid value for --adapters: 'a/b' is not a valid adapter name"),
        ([], {"SCALABL_ADAPTERS": "a=x,a=y"}, "Invalid value for --adapters: the name 'a' is used twice"),
        (["--adapters", "x=y"], {}, "--adapters: 'x' is already the name of --adapter"),
        (["--nonsense"], {}, "No such option: --nonsense"),
    ],
)
def test_a_wrong_value_is_a_usage_error(arguments: list[str], environment: dict[str, str], said: str) -> None:
    result = CliRunner().invoke(app, ["serve", "--adapter", "x", *arguments], env=environment | {"COLUMNS": "300"})
    assert result.exit_code == 2
    assert said in " ".join(result.stderr.replace("│", " ").split())


def test_the_adapter_is_required() -> None:
    result = CliRunner().invoke(app, ["serve"], env={"COLUMNS": "300"})
    assert result.exit_code == 2
    assert "--adapter" in result.stderr


def test_keys_are_never_shown() -> None:
    settings = ServeSettings(adapter=Path("x"), api_keys="very-secret")
    assert "very-secret" not in repr(settings) + settings.model_dump_json()
    with pytest.raises(ValidationError, match="frozen"):
        settings.port = 1  # type: ignore[misc]  # that is the point


def test_the_version_is_the_packages() -> None:
    result = CliRunner().invoke(app, ["--version"])
    assert (result.exit_code, result.stdout) == (0, f"scalabl {__version__}\n")


def test_an_adapter_that_cannot_be_served_ends_the_process_with_one_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "scalabl_server.cli", "serve", "--adapter", str(tmp_path), "--port", "0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert errors == [
        f"error: {tmp_path} has no adapter_config.json; an adapter folder needs it and adapter_model.safetensors"
    ]
    assert "Traceback" not in done.stderr


class Kitchen(BaseModel):
    """Settings of a command made for this test."""

    eggs: int = Field(default=2, ge=1, description="How many.")
    name: str | None = Field(default=None, description="For whom.")


def test_a_command_is_made_of_a_model_and_a_function() -> None:
    seen: list[tuple[Kitchen, str]] = []

    def cook(kitchen: Kitchen, style: str = "soft") -> None:
        """Cook."""
        seen.append((kitchen, style))

    application = typer.Typer()
    application.command()(command_for(Kitchen, cook, env_prefix="KITCHEN_"))
    runner = CliRunner()
    assert runner.invoke(application, ["--eggs", "3", "--style", "hard"]).exit_code == 0
    assert runner.invoke(application, [], env={"KITCHEN_NAME": "Ann"}).exit_code == 0
    assert seen == [(Kitchen(eggs=3), "hard"), (Kitchen(name="Ann"), "soft")]
    assert runner.invoke(application, ["--eggs", "0"]).exit_code == 2


def test_a_device_and_a_device_map_are_one_too_many() -> None:
    with pytest.raises(ValidationError, match="--device-map and --device cannot be combined; leave --device out"):
        ServeSettings(adapter=Path("x"), device="cpu", device_map="auto")
    with pytest.raises(ValidationError, match="--device-map works only with --engine transformers"):
        ServeSettings(adapter=Path("x"), engine="vllm", engine_url="http://x", device_map="auto")
