"""docs/your_own_model.md, pasted from the first block to the last."""

import re
import shlex
import sys
from pathlib import Path

import pytest

from src.evaluate import main as evaluate
from src.records import read_rows, verify
from src.records.__main__ import main as records

PAGE = (Path(__file__).resolve().parent.parent / "docs" / "your_own_model.md").read_text()
MAINS = {"src.evaluate": evaluate, "src.records": records}


def test_the_page_can_be_pasted_from_top_to_bottom(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    # A prompt has the current folder on its path.
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.delitem(sys.modules, "my_network", raising=False)
    blocks = re.findall(r"^```(python|sh)\n(.*?)^```$", PAGE, re.M | re.S)
    assert [language for language, _ in blocks].count("sh") == 2
    Path("my_network.py").write_text(blocks[0][1])
    names = {}
    for language, block in blocks[1:]:
        if language == "python":
            exec(block, names)
            continue
        for command in block.replace("\\\n", " ").splitlines():
            python, _, module, *words = shlex.split(command)
            assert python == "python"
            MAINS[module](words)
    shown = capsys.readouterr().out
    for phrase in ("apgd cross-entropy", "checklist: 10 checks", "10 rows, nothing wrong"):
        assert phrase in shown
    # What the two lines after `certify_dataset` print.
    assert shown.endswith("[]\n[]\n")
    written = {path.name for folder in ("results", "figures") for path in Path(folder).iterdir()}
    named = set(re.findall(r"`(?:results|figures)/(make_\w+\.\w+)`", PAGE))
    assert len(named) == 5
    assert named <= written
    assert len([name for name in written if name.endswith(".png")]) == 2
    assert Path("mine.png").exists()
    assert len(read_rows("mine.csv")) == 10
    assert verify("mine.csv") == []


def test_the_loss_that_the_page_names_is_the_largest_distance_from_the_grid():
    # Half a step of the grid at every pixel.
    assert f"{(3 * 32 * 32) ** 0.5 / 510:.2f}" == "0.11"
    assert "at 3 x 32 x 32 up to 0.11" in PAGE


@pytest.mark.parametrize("key", ["images", "labels", "predictions", "indices"])
def test_the_page_names_what_the_attacked_images_come_with(key):
    assert f"`{key}`" in PAGE
