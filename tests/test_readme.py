"""The README points at lines and files that are there, and its commands have flags that the scripts take."""
import re
import shlex
from pathlib import Path

import pytest

import evilm
import finetune
import pretrain
import train_tokenizer

HOME = Path(evilm.__file__).parent
README = (HOME / "README.md").read_text()
SCRIPTS = {"train_tokenizer": train_tokenizer, "pretrain": pretrain, "finetune": finetune}
COMMANDS = re.findall(rf"python ({'|'.join(SCRIPTS)})\.py([^\n|`#]*)", README.replace("\\\n", " "))


@pytest.mark.parametrize("name, line", re.findall(r"`([\w.]+)` evilm\.py:(\d+)", README))
def test_the_map_names_the_line_of_each_definition(name, line):
    text = (HOME / "evilm.py").read_text().splitlines()[int(line) - 1]
    assert re.match(rf"\s*(def|class) {name.split('.')[-1]}\b", text)


def test_links_and_pictures_lead_to_files():
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if not link.startswith("http")]
    assert links and all((HOME / link).exists() for link in links)


@pytest.mark.parametrize("script, flags", COMMANDS)
def test_commands_have_flags_that_the_scripts_take(script, flags):
    words = shlex.split(re.split(r"\s{3,}", flags)[0])
    SCRIPTS[script].parse(words)
