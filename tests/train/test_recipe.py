from __future__ import annotations

import pytest

from lorainit import LoraInitError
from lorainit.cli import main
from lorainit.train.recipe import Recipe
from lorainit.train.run import start, started, train
from runs import recipe


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "sst3"}, "unknown task"),
        ({"method": "pisa"}, "unknown method 'pisa'; did you mean 'pissa'"),
        ({"method_options": {"exactly": True}}, r"has no option \['exactly'\]"),
        ({"model": "/no/such/model"}, "model '/no/such/model' cannot be loaded"),
        ({"model": "package:no_such_package/x"}, "'no_such_package' is not installed"),
        ({"dtype": "float33"}, "dtype 'float33'"),
        ({"lora": {"rank": 4}}, "lora: .*rank"),
        ({"lora": {"target_modules": ["nothing"]}}, "lora: .*target"),
        ({"lora": {"r": 64}, "method": "pissa"}, r"rank 64 exceeds min\(in, out\) = 16"),
        ({"train": {"learning_rat": 1}}, r"train: \['learning_rat'\] are no fields"),
        ({"base": "ofset"}, "base='ofset' is not one of"),
        ({"start": "/no/such/start"}, "no training checkpoint"),
        ({"adapter": "ia3"}, r"adapter='ia3' is not one of \['lora', 'adalora', 'none'\]"),
        ({"adapter": "adalora", "method": "pissa"}, "no LoRA that method 'pissa' could start"),
        ({"adapter": "none", "lora_plus": 16.0}, "adapter='none' has none"),
        ({"lora_plus": 0.0}, "lora_plus must be positive"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_wrong_recipe_is_refused_by_name_and_writes_no_result(files, tmp_path, changes, message) -> None:
    with pytest.raises(LoraInitError, match=message):
        train(recipe(files, tmp_path, **changes))
    assert not (tmp_path / "result.json").exists()


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


@pytest.mark.parametrize("carry_out", [start, started])
@pytest.mark.parametrize("adapter", ["adalora", "none"])
def test_what_is_no_lora_has_no_start(files, tmp_path, carry_out, adapter) -> None:
    with pytest.raises(LoraInitError, match=f"adapter='{adapter}' has no start"):
        carry_out(recipe(files, tmp_path / "run", adapter=adapter))
    assert not (tmp_path / "run").exists()
