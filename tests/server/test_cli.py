"""The commands, run as a shell would: exit codes, standard output, one line on standard error."""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from commands import Run, shell

from weft.demo import tasks
from weft.server.cli import _in_words
from weft.server.cli.serve import SETTINGS, build_config, serve
from weft.server.config import EngineConfig, ModelConfig, ServerConfig

DEMO_FOLDER = Path(tasks.__file__).parent


def parse(*args: str) -> ServerConfig:
    with serve.make_context("serve", list(args)) as context:
        return build_config(context.params)


class TestUsage:
    def test_no_command_shows_the_help(self, run: Run) -> None:
        ran = run()
        assert ran.exit_code == 2
        assert "serve" in ran.error

    def test_help_and_version_succeed(self, run: Run) -> None:
        assert run("--help").exit_code == 0
        assert run("serve", "--help").exit_code == 0
        assert "weft" in run("--version").output

    def test_an_unknown_option_is_named_with_the_nearest(self, run: Run) -> None:
        ran = run("serve", "--prot", "1")
        assert ran.exit_code == 2
        assert "--prot" in ran.error_line
        assert "--port" in ran.error_line

    def test_an_unknown_command_is_named(self, run: Run) -> None:
        ran = run("sevre")
        assert ran.exit_code == 2
        assert "sevre" in ran.error_line

    def test_commands_of_a_client_do_not_wait_for_torch(self) -> None:
        script = (
            "import sys; from weft.server.cli import main; main(['--help']); "
            "main(['generate', 'x', '--address', '127.0.0.1:1']); "
            "sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
        )
        assert subprocess.run([sys.executable, "-c", script], capture_output=True, check=False).returncode == 0


class TestServeOptions:
    def test_every_field_of_the_configuration_has_an_option(self) -> None:
        given = {(setting.owner, setting.field) for setting in SETTINGS}
        wanted = {(owner, field.name) for owner in (ModelConfig, EngineConfig, ServerConfig) for field in fields(owner)}
        assert wanted - given == {(ServerConfig, "model"), (ServerConfig, "engine")}
        assert given <= wanted

    def test_no_option_leaves_the_defaults(self) -> None:
        assert parse("--model", "m") == ServerConfig(ModelConfig("m"))

    def test_options_reach_their_fields(self, tmp_path: Path) -> None:
        config = parse(
            *("--model", "m", "--dtype", "float16", "--port", "7", "--max-request-seconds", "2.5"),
            *("--kv-tokens", "128", "--adapters", str(tmp_path)),
            *("--source-root", str(tmp_path), "--source-root", str(tmp_path.parent)),
        )
        assert config == ServerConfig(
            model=ModelConfig("m", dtype="float16"),
            engine=EngineConfig(kv_tokens=128),
            port=7,
            max_request_s=2.5,
            adapters=tmp_path,
            source_roots=(tmp_path, tmp_path.parent),
        )

    def test_the_command_line_goes_before_the_environment_and_that_before_the_file(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        file = tmp_path / "weft.toml"
        file.write_text('model = "from-file"\nport = 1\nmetrics_port = 1\nblock-tokens = 32\n')
        monkeypatch.setenv("WEFT_PORT", "2")
        monkeypatch.setenv("WEFT_METRICS_PORT", "2")
        config = parse("--config", str(file), "--port", "3")
        assert (config.port, config.metrics_port) == (3, 2)
        assert (config.model.path, config.engine.block_tokens) == ("from-file", 32)

    def test_weights_of_adapters_come_from_everywhere(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        weights = (("a", 2.0), ("b/c", 0.5))
        assert parse("--model", "m", "--adapter-weight", "a=2", "--adapter-weight", "b/c=0.5").engine == EngineConfig(
            adapter_weights=weights
        )
        file = tmp_path / "weft.toml"
        file.write_text('model = "m"\nadapter-weight = ["a=2", "b/c=0.5"]\n')
        assert parse("--config", str(file)).engine.adapter_weights == weights
        monkeypatch.setenv("WEFT_ADAPTER_WEIGHT", "a=2 b/c=0.5")
        assert parse("--model", "m").engine.adapter_weights == weights

    @pytest.mark.parametrize("text", ["a", "=2", "a=", "a=two", "a=nan", "a=2,b=3", "a=2 b=3"])
    def test_a_weight_that_is_none_is_refused(self, run: Run, text: str) -> None:
        ran = run("serve", "--model", "m", "--adapter-weight", text)
        assert ran.exit_code == 2
        assert f"{text!r} is not NAME=WEIGHT" in ran.error_line

    @pytest.mark.parametrize("name", ["_a", "a b", "a..b", "x" * 129])
    def test_a_weight_is_refused_for_a_name_that_no_adapter_can_have(self, run: Run, name: str) -> None:
        ran = run("serve", "--model", "m", "--adapter-weight", f"{name}=2")
        assert ran.exit_code == 2
        assert f"names an adapter that is '{name}'; must be 1 to 128 letters" in ran.error_line

    def test_a_list_of_weights_in_one_text_is_refused_with_how_to_give_it(
        self, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        file = tmp_path / "weft.toml"
        file.write_text('model = "m"\nadapter-weight = "a=2 b=3"\n')
        words = "several are options of their own, parted by spaces in the environment, a list in the file"
        assert words in run("serve", "--config", str(file)).error_line
        monkeypatch.setenv("WEFT_ADAPTER_WEIGHT", "a=2,b=3")
        assert words in run("serve", "--model", "m").error_line

    def test_source_roots_are_folders_and_prefixes(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        assert parse("--model", "m", "--source-root", "hf:org/").source_prefixes == ("hf:org/",)
        monkeypatch.setenv("WEFT_SOURCE_ROOT", f"s3://bucket/loras/ {tmp_path}")
        config = parse("--model", "m")
        assert (config.source_prefixes, config.all_source_roots) == (("s3://bucket/loras/",), (tmp_path,))

    def test_the_watch_can_be_turned_off_everywhere(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        file = tmp_path / "weft.toml"
        file.write_text('model = "m"\nwatch = false\n')
        assert parse("--model", "m").watch
        assert not parse("--model", "m", "--no-watch").watch
        assert not parse("--config", str(file)).watch
        assert parse("--config", str(file), "--watch").watch
        monkeypatch.setenv("WEFT_WATCH", "0")
        assert not parse("--model", "m").watch

    def test_the_file_may_come_from_the_environment(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        file = tmp_path / "weft.toml"
        file.write_text(f'model = "m"\nsource-root = ["{tmp_path}"]\n')
        monkeypatch.setenv("WEFT_CONFIG", str(file))
        assert parse().source_roots == (tmp_path,)

    @pytest.mark.parametrize(
        ("text", "says"),
        [
            ("zzz = 1", "'zzz' is no key; the keys are the options"),
            ("model = 5", "'model' is 5; must be a text"),
            ("adapters = 5", "'adapters' is 5; must be a text"),
            ("watch = 1", "'watch' is 1; must be true or false"),
            ("port = [1]", "'port' is [1]; must be a number"),
            ('log-level = "loud"', "--log-level"),
            ("prot = 1", "'prot' is no key; did you mean 'port'?"),
            ("[engine]\nkv_tokens = 1", "'engine' is no key"),
            ("port =", "can't be read as TOML"),
            ('port = "many"', "--port"),
        ],
    )
    def test_a_bad_file_is_refused_by_name(self, run: Run, tmp_path: Path, text: str, says: str) -> None:
        file = tmp_path / "weft.toml"
        file.write_text(text)
        ran = run("serve", "--config", str(file))
        assert ran.exit_code == 2
        assert says in ran.error_line

    def test_the_log_level_may_come_from_the_file(self, tmp_path: Path) -> None:
        file = tmp_path / "weft.toml"
        file.write_text('log-level = "error"\n')
        for args, level in (([], "error"), (["--log-level", "debug"], "debug")):
            with serve.make_context("serve", ["--config", str(file), *args]) as context:
                assert context.params["log_level"] == level

    def test_a_missing_file_is_named(self, run: Run, tmp_path: Path) -> None:
        ran = run("serve", "--config", str(tmp_path / "none.toml"))
        assert ran.exit_code == 2
        assert "none.toml can't be read as TOML (No such file or directory)" in ran.error_line

    @pytest.mark.parametrize(
        ("args", "says"),
        [
            ([], "--model is missing"),
            (["--model", "m", "--port", "65536"], "--port is 65536; must be from 0 to 65535"),
            (["--model", "m", "--port", "x"], "--port"),
            (["--model", "m", "--dtype", "int4"], "--dtype is 'int4'; must be one of auto"),
            (["--model", "m", "--adapters", "/no/such"], "--adapters is '/no/such'; must be an existing folder"),
        ],
    )
    def test_a_bad_value_is_wrong_usage(self, run: Run, args: list[str], says: str) -> None:
        ran = run("serve", *args)
        assert ran.exit_code == 2
        assert says in ran.error_line


class TestDemo:
    def test_one_mixed_batch_is_answered_rightly(self, run: Run) -> None:
        ran = run("demo")
        assert ran.exit_code == 0, ran.output + ran.error
        names = {folder.name for folder in (DEMO_FOLDER / "adapters").iterdir()}
        lines = ran.output.splitlines()
        assert {line.split()[0].rstrip(",") for line in lines if "✓" in line} == names
        assert f"{len(names) - 1} of {len(names) - 1} answers are right" in ran.output
        assert re.search(r"^kind, by a head of its own, classifies '.+': \w+ 9\d\.\d%, .* ✓$", ran.output, re.MULTILINE)
        assert re.search(
            r"^sentiment scores two answers to '.+=': \w+ [\d.]+%, \w+ [\d.]+% ✓$", ran.output, re.MULTILINE
        )
        assert "✗" not in ran.output

    def test_adapters_that_are_mixed_up_fail_it(self, run: Run, tmp_path: Path) -> None:
        shutil.copytree(DEMO_FOLDER / "base", tmp_path / "base")
        shutil.copytree(DEMO_FOLDER / "adapters", tmp_path / "adapters")
        (tmp_path / "adapters" / "upper").rename(tmp_path / "aside")
        (tmp_path / "adapters" / "reverse").rename(tmp_path / "adapters" / "upper")
        (tmp_path / "aside").rename(tmp_path / "adapters" / "reverse")
        ran = run("demo", "--folder", str(tmp_path))
        assert ran.exit_code == 1
        wrong = {line.split()[0] for line in ran.output.splitlines() if "✗" in line}
        assert wrong == {"upper", "reverse"}

    def test_a_folder_without_a_demo_says_how_to_make_one(self, run: Run, tmp_path: Path) -> None:
        ran = run("demo", "--folder", str(tmp_path))
        assert ran.exit_code == 1
        assert "python -m weft.demo.train" in ran.error_line


@pytest.mark.parametrize(
    "args",
    [
        ("generate", "\udcff"),
        ("generate", "x", "--adapter", "\udcff"),
        ("generate", "x", "--stop", "\udcff"),
        ("adapters", "show", "\udcff"),
        ("adapters", "load", "\udcff", "/x"),
        ("adapters", "load", "x", "/\udcff"),
        ("adapters", "load", "x", "/x", "--label", "a=\udcff"),
    ],
)
def test_an_argument_that_is_not_utf8_is_wrong_usage(run: Run, args: tuple[str, ...]) -> None:
    ran = run(*args)
    assert ran.exit_code == 2
    assert "not UTF-8" in ran.error_line


def test_standard_input_that_is_not_utf8_fails_in_one_line() -> None:
    ran = shell("generate", "-", input=b"\xff")
    assert ran.exit_code == 2
    assert "not UTF-8" in ran.error_line


def test_output_that_can_not_be_written_fails_in_one_line(address: str) -> None:
    for args in (("generate", "x", "--max-tokens", "1"), ("adapters", "list")):
        with Path("/dev/full").open("wb") as full:
            ran = shell(*args, "--address", address, stdout=full)
        assert ran.exit_code == 1
        assert ran.error_line == "input or output: No space left on device"


@pytest.mark.parametrize("error", [MemoryError(), OverflowError("cannot fit 'int' into an index-sized integer")])
def test_too_little_memory_fails_in_one_line(error: Exception) -> None:
    words, exit_code = _in_words(error)
    assert exit_code == 1
    assert words.startswith("there is not enough memory (")


def test_a_model_that_is_none_fails_in_one_line(run: Run, tmp_path: Path) -> None:
    ran = run("serve", "--model", str(tmp_path), "--port", "0", "--metrics-port", "0", "--log-level", "error")
    assert ran.exit_code == 1
    assert str(tmp_path) in ran.error_line


@pytest.mark.parametrize("option", ["--port", "--metrics-port"])
def test_a_taken_port_fails_in_one_line(run: Run, folders: Path, option: str) -> None:
    ports = {"--port": "0", "--metrics-port": "0"}
    with socket.create_server(("127.0.0.1", 0)) as taken:
        ports[option] = str(taken.getsockname()[1])
        args = [word for pair in ports.items() for word in pair]
        ran = run("serve", "--model", str(folders / "base"), *args, "--log-level", "error")
    assert ran.exit_code == 1
    assert ran.error_line.startswith(f"{option} is {ports[option]}; can't listen on 127.0.0.1:{ports[option]} (")


class TestAccess:
    """What says who may call is read before the model, and what is wrong with it is one line."""

    def test_an_address_that_others_reach_wants_to_know_who_calls(self, run: Run) -> None:
        ran = run("serve", "--model", "none", "--host", "0.0.0.0")  # noqa: S104 - refused
        assert ran.exit_code == 2
        assert "give --access FILE or --tls-client-ca FILE, or --allow-anonymous" in ran.error_line

    def test_an_unknown_key_of_the_access_file_is_named_with_the_nearest(self, run: Run, tmp_path: Path) -> None:
        path = tmp_path / "access.toml"
        path.write_text("[callers.a]\nadaptors = []\n")
        ran = run("serve", "--model", "none", "--access", str(path))
        assert ran.exit_code == 2
        assert ran.error_line == f"--access {path}: callers.a.adaptors is no key; did you mean 'adapters'?"

    def test_a_malformed_certificate_is_named(self, run: Run, tmp_path: Path) -> None:
        (tmp_path / "cert").write_text("not a certificate")
        (tmp_path / "key").write_text("not a key")
        ran = run("serve", "--model", "none", "--tls-cert", str(tmp_path / "cert"), "--tls-key", str(tmp_path / "key"))
        assert ran.exit_code == 2
        assert "holds no certificate in PEM" in ran.error_line

    def test_options_reach_their_fields(self, tmp_path: Path) -> None:
        config = parse(
            *("--model", "m", "--host", "::", "--tls-cert", "c", "--tls-key", "k", "--tls-client-ca", "ca"),
            *("--access", str(tmp_path / "access.toml")),
        )
        assert (config.tls_cert, config.tls_key, config.tls_client_ca) == (Path("c"), Path("k"), Path("ca"))
        assert config.access == tmp_path / "access.toml"
        assert parse("--model", "m", "--host", "::", "--allow-anonymous").allow_anonymous
