"""The pages of examples: what they say to type is run, and what they say comes back does."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import pytest
from pages import Step, agrees, differences, run, steps_of

EXAMPLES = Path(__file__).parents[2] / "examples"
PAGES = sorted(path.parent.name for path in EXAMPLES.glob("*/README.md"))
LONG = {"support-desk", "distilling", "train-push-ask"}
"""Pages that train for a minute or so."""

TIMEOUT_S = 600


@pytest.mark.slow
@pytest.mark.parametrize("name", PAGES)
def test_a_page_holds(name: str, tmp_path: Path) -> None:
    """In a copy of the repository that has the page's own folder and the demo's."""
    if name in LONG and os.environ.get("WEFT_EXAMPLES") != "all":
        pytest.skip("takes a minute: `make examples` runs all pages")
    shutil.copytree(EXAMPLES / name, tmp_path / "examples" / name)
    (tmp_path / "examples" / "demo").symlink_to(EXAMPLES / "demo")
    steps = steps_of((EXAMPLES / name / "README.md").read_text())
    assert steps[0] == Step(f"cd examples/{name}")
    wrong = list(differences(steps, run(steps, tmp_path, tmp_path / "background.log", TIMEOUT_S)))
    assert not wrong, "\n\n".join([*wrong, *(log.read_text() for log in sorted(tmp_path.rglob("*.log")))])


def test_all_pages_are_listed() -> None:
    listed = re.findall(r"^\| \[[^]]+\]\(([a-z-]+)/README\.md\)", (EXAMPLES / "README.md").read_text(), re.MULTILINE)
    assert sorted(listed) == PAGES


def test_what_is_typed_and_what_comes_back() -> None:
    page = "Say:\n\n    $ one \\\n        --two\n    back\n    $ three &\n\ntext\n\n    not typed\n"
    assert steps_of(page) == [Step("one \\\n    --two", ["back"]), Step("three &")]


@pytest.mark.parametrize(
    ("told", "came", "does"),
    [
        (["loss 0.50, 3 steps"], ["loss 0.52, 3 steps"], True),
        (["loss 0.50, 3 steps"], ["loss 0.60, 3 steps"], False),
        (["loss 0.50, 3 steps"], ["loss 0.50, 4 steps"], False),
        (["loss 8.44e-05"], ["loss 0.0002"], True),
        (["  a   b"], [" a b  "], True),
        (["it is sha256:…, whole"], ["it is sha256:0a1b, whole"], True),
        (["it is sha256:…, whole"], ["it is sha256:0a1b"], False),
        (["first", "…", "last"], ["first", "last"], True),
        (["first", "…", "last"], ["first", "2", "3", "last"], True),
        (["first", "…", "last"], ["first", "2"], False),
        ([], ["noise"], False),
    ],
)
def test_what_comes_back_is_compared(told: list[str], came: list[str], does: bool) -> None:
    assert agrees(told, came) is does


def test_a_shell_keeps_its_folder_and_ends_what_it_left_behind(tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    steps = [Step("cd inner"), Step("sleep 600 &"), Step("basename $PWD", ["inner"]), Step("false")]
    ended = run(steps, tmp_path, tmp_path / "log", TIMEOUT_S)
    assert list(differences(steps, ended)) == ["$ false\nended with 1"]


def test_a_command_that_is_refused_may_fail(tmp_path: Path) -> None:
    steps = [Step("echo 'weft: no' >&2; false", ["weft: no"]), Step("exit 0"), Step("true")]
    ended = run(steps, tmp_path, tmp_path / "log", TIMEOUT_S)
    assert list(differences(steps, ended)) == ["$ exit 0\nwas not run", "$ true\nwas not run"]
