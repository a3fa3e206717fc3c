from pathlib import Path
from typing import Any

import pytest
import yaml

from signbit.errors import SignbitError
from signbit.methods import METHODS
from signbit.recipe import CommonOptions, Recipe, parse_overrides, presets
from signbit.training.options import TrainingOptions

BILLM = {"method": "billm"}


def refuse(fields: dict[str, Any], *words: str) -> None:
    """The recipe is refused with one line that says ``words``."""
    with pytest.raises(SignbitError) as caught:
        Recipe(fields)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


@pytest.mark.parametrize("name", presets())
def test_a_preset_survives_its_own_dictionary_and_yaml(name: str) -> None:
    recipe = Recipe.load(name)
    fields = recipe.to_dict()
    assert Recipe(fields).to_dict() == fields
    assert Recipe(yaml.safe_load(yaml.safe_dump(fields))).to_dict() == fields
    assert fields["method"] == recipe.method.name


def test_there_is_a_preset_for_each_method() -> None:
    assert {Recipe.load(name).method.name for name in presets()} == METHODS.keys()


def test_the_dictionary_has_every_key_of_the_method() -> None:
    for name, method in METHODS.items():
        keys = {"method", *CommonOptions.model_fields, *method.options.model_fields}
        assert Recipe({"method": name}).to_dict().keys() == keys


def test_presets_differ() -> None:
    assert len({str(Recipe.load(name).to_dict()) for name in presets()}) == len(presets())


def test_overrides_replace_keys_of_common_and_method_options() -> None:
    recipe = Recipe.load("billm", {"seed": 7, "group_size": 64, "skip": ["*.down_proj"]})
    assert (recipe.common.seed, recipe.options.group_size) == (7, 64)
    assert recipe.common.skip == ("*.down_proj",)
    assert recipe.to_dict()["skip"] == ["*.down_proj"]
    assert Recipe.load("billm", {"skip": "*.down_proj"}).common.skip == ("*.down_proj",)


@pytest.mark.parametrize(
    ("key", "nearest"),
    [("max_salint", "max_salient"), ("sample", "samples"), ("groupsize", "group_size"), ("Method", "method")],
)
def test_an_unknown_key_is_refused_with_the_nearest(key: str, nearest: str) -> None:
    refuse({**BILLM, key: 1}, repr(key), f"did you mean '{nearest}'?")


def test_an_unknown_key_like_no_other_is_refused_with_all() -> None:
    refuse({**BILLM, "zzz": 1}, "'zzz'", "billm", "max_salient", "seqlen")


def test_a_key_of_another_method_is_unknown() -> None:
    refuse({**BILLM, "planes": 2}, "'planes'", "method billm")


@pytest.mark.parametrize(("name", "nearest"), [("bilm", "billm"), ("xnr", "xnor"), ("signs", "sign")])
def test_an_unknown_method_or_preset_is_refused_with_the_nearest(name: str, nearest: str) -> None:
    refuse({"method": name}, f"unknown method '{name}'", f"did you mean '{nearest}'?")
    with pytest.raises(SignbitError, match=f"no recipe or file '{name}': did you mean '{nearest}'"):
        Recipe.load(name)


@pytest.mark.parametrize("fields", [{}, {"method": None}, {"method": 3}, {"method": "int8"}])
def test_a_recipe_without_a_method_or_with_one_like_no_other_is_refused_with_all(fields: dict[str, Any]) -> None:
    refuse(fields, "unknown method", *METHODS)


def test_a_method_that_is_no_name() -> None:
    refuse({"method": ["billm"]}, "unknown method")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("samples", -1),
        ("samples", "many"),
        ("samples", None),
        ("samples", 1.5),
        ("seqlen", 1),
        ("seed", -1),
        ("seed", 2**63),
        ("damping", -0.1),
        ("damping", 11),
        ("damping", float("nan")),
        ("embeddings", "int3"),
        ("head", 8),
        ("dtype", "float8"),
        ("calib", 5),
        ("group_size", -1),
        ("mean", "perhaps"),
        ("scale_dtype", "float32"),
        ("salience", "vibes"),
        ("max_salient", -1),
        ("split_candidates", 0),
        ("feedback", "loud"),
    ],
)
def test_a_bad_value_is_refused_with_its_key_and_what_it_was(key: str, value: Any) -> None:
    refuse({**BILLM, key: value}, f"recipe key '{key}'", repr(value))


def test_the_choices_are_listed() -> None:
    refuse({**BILLM, "feedback": "loud"}, "none", "diagonal", "block", "column")


def test_a_calibrated_method_without_samples_is_refused() -> None:
    refuse({**BILLM, "samples": 0}, "billm needs calibration")
    assert Recipe({"method": "sign", "samples": 0}).common.samples == 0


def test_calibration_is_settled_by_the_model_unless_given() -> None:
    recipe = Recipe(BILLM)
    assert recipe.for_model("demo").common.calib == "self"
    assert recipe.for_model("meta-llama/Llama-3.2-1B").common.calib == "c4"
    assert Recipe({**BILLM, "calib": "notes.txt"}).for_model("demo").common.calib == "notes.txt"
    assert recipe.for_model("demo").to_dict() == {**recipe.to_dict(), "calib": "self"}


@pytest.mark.parametrize(
    ("pair", "key", "value"),
    [
        ("seed=7", "seed", 7),
        ("damping=1e-2", "damping", "1e-2"),  # YAML 1.1 reads this as text; the recipe takes it all the same
        ("mean=false", "mean", False),
        ("calib=a=b.txt", "calib", "a=b.txt"),
        ("calib=", "calib", None),
        (" seed = 7", "seed", 7),
        ('skip=["*.down_proj", lm_head]', "skip", ["*.down_proj", "lm_head"]),
    ],
)
def test_overrides_are_yaml(pair: str, key: str, value: Any) -> None:
    overrides = parse_overrides([pair])
    assert overrides == {key: value}
    assert key in Recipe({**BILLM, **overrides}).to_dict()


def test_an_exponent_without_a_point_is_a_number() -> None:
    assert Recipe({**BILLM, **parse_overrides(["damping=1e-2"])}).common.damping == 0.01


def test_the_last_override_of_a_key_counts() -> None:
    assert parse_overrides(["seed=1", "seed=2"]) == {"seed": 2}


@pytest.mark.parametrize("pair", ["seed", "=7", "", "skip=[a", "skip=*.down_proj", "calib='"])
def test_a_malformed_override_is_refused_as_it_was_given(pair: str) -> None:
    with pytest.raises(SignbitError) as caught:
        parse_overrides([pair])
    assert str(caught.value).startswith(f"--set {pair!r}: ")
    assert "\n" not in str(caught.value)


class TestFiles:
    def test_a_file_is_read(self, tmp_path: Path) -> None:
        file = tmp_path / "mine.yaml"
        file.write_text("method: xnor\nplanes: 2 # twice\nskip: ['*.o_proj']\n")
        recipe = Recipe.load(str(file))
        assert recipe.to_dict()["planes"] == 2
        assert recipe.common.skip == ("*.o_proj",)
        assert Recipe.load(str(file), {"planes": 3}).to_dict()["planes"] == 3

    def test_presets_go_before_files(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        Path("billm").write_text("method: sign")
        assert Recipe.load("billm").method.name == "billm"
        assert Recipe.load("./billm").method.name == "sign"

    def test_a_saved_recipe_makes_itself_again(self, tmp_path: Path) -> None:
        recipe = Recipe.load("billm", {"seed": 3, "damping": 0.1, "skip": ["a*"]})
        file = tmp_path / "saved.yaml"
        file.write_text(yaml.safe_dump(recipe.to_dict()))
        assert Recipe.load(str(file)).to_dict() == recipe.to_dict()

    @pytest.mark.parametrize(
        ("content", "problem"),
        [
            (b"", "is not a mapping"),
            (b"- method: billm", "is not a mapping"),
            (b"billm", "is not a mapping"),
            (b"1: billm", "is not a mapping"),
            (b"method: [billm", "is not valid YAML"),
            (b"method: billm\n\tseed: 1", "is not valid YAML"),
            (b"method: \xff\xfe", "is not valid YAML"),
            (b"method: !!python/object/apply:os.getcwd []", "is not valid YAML"),
            (b"method: billm\nsed: 1", "unknown recipe key 'sed'"),
            (b"seed: 1", "unknown method None"),
        ],
    )
    def test_a_bad_file(self, tmp_path: Path, content: bytes, problem: str) -> None:
        file = tmp_path / "mine.yaml"
        file.write_bytes(content)
        with pytest.raises(SignbitError) as caught:
            Recipe.load(str(file))
        assert problem in str(caught.value)
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize("name", ["missing.yaml", "", "."])
    def test_no_such_file(self, name: str) -> None:
        with pytest.raises(SignbitError, match="no recipe or file"):
            Recipe.load(name)


def test_options_that_do_not_go_together_are_refused_in_words() -> None:
    with pytest.raises(SignbitError, match=r"^recipe: keep 4 of 1 is more than all$"):
        Recipe({"method": "stbllm", "of": 1, "samples": 1})


# --- training ---------------------------------------------------------------------------------------------------------


def test_a_training_key_makes_a_recipe_for_training() -> None:
    recipe = Recipe({"method": "sign", "steps": 7, "seed": 3, "planes": 2})
    assert recipe.training is not None
    assert (recipe.training.steps, recipe.training.batch) == (7, 8)
    assert Recipe(recipe.to_dict()).to_dict() == recipe.to_dict()
    start = recipe.without_training()
    assert start.training is None
    assert start.to_dict() == Recipe({"method": "sign", "seed": 3, "planes": 2}).to_dict()
    assert not TrainingOptions.model_fields.keys() & start.to_dict().keys()


def test_training_keys_are_validated() -> None:
    refuse({"method": "sign", "steps": 0}, "'steps'", "0")
    refuse({"method": "sign", "step": 1}, "'step'", "did you mean 'steps'?")


def test_training_keys_are_no_other_keys() -> None:
    assert not TrainingOptions.model_fields.keys() & CommonOptions.model_fields.keys()
    for method in METHODS.values():
        assert not TrainingOptions.model_fields.keys() & method.options.model_fields.keys()
