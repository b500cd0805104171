from __future__ import annotations

import pytest

from lorainit.cli import main
from lorainit.errors import LoraInitError
from lorainit.train.run import Recipe, train


@pytest.mark.parametrize("there", [False, True], ids=["no folder", "no checkpoint in it"])
def test_to_resume_without_a_checkpoint_is_refused_by_folder_before_anything_is_loaded(tmp_path, capsys, there) -> None:
    output = tmp_path / "run"
    if there:
        (output / "adapter").mkdir(parents=True)
    message = f"resume: there is no checkpoint in {output} to continue from"
    with pytest.raises(LoraInitError, match=message):
        train(Recipe(model="no/model", task="sst2", output=str(output), resume=True))
    assert main(["train", "--model", "no/model", "--task", "sst2", "--output", str(output), "--resume"]) == 1
    assert message in capsys.readouterr().err


def test_the_trainers_own_field_for_it_is_refused_as_it_would_begin_anew() -> None:
    with pytest.raises(LoraInitError, match="a recipe says `resume: true`"):
        train(Recipe(model="no/model", task="sst2", train={"resume_from_checkpoint": True}))
