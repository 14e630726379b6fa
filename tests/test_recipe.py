"""Recipes and their YAML: what is accepted, what is refused, and in which words."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from distill import catalog, recipe, yaml_strict
from distill.errors import RecipeError, UsageError
from distill.schema import Schedule, Train

BASE: dict[str, Any] = {
    "description": "x",
    "data": {"source": "rows.csv"},
    "teacher": {"architecture": "longformer"},
    "student": {"architecture": "bert_miniature"},
}


@pytest.fixture
def base(tmp_path: Path) -> str:
    path = tmp_path / "base.yaml"
    path.write_text(yaml.safe_dump(BASE))
    return str(path)


def refusal(name: str, *settings: str, student: str | None = None) -> str:
    with pytest.raises(RecipeError) as caught:
        recipe.load(name, settings, student)
    message = str(caught.value)
    assert "\n" not in message
    return message


# YAML


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-5", 1e-5), ("1E5", 1e5), ("-2.5e+3", -2500.0), (".5", 0.5), ("3.", 3.0), ("1.0", 1.0), (".inf", math.inf),
        ("7", 7), ("-7", -7), ("+7", 7), ("0", 0), ("1_000", 1000),
        ("true", True), ("False", False), ("null", None), ("~", None), ("", None),
        ("no", "no"), ("yes", "yes"), ("on", "on"), ("off", "off"), ("y", "y"), ("NO", "NO"),
        ("007", "007"), ("0x1f", "0x1f"), ("12:30:45", "12:30:45"), ("2024-01-31", "2024-01-31"),
        ("1.2.3", "1.2.3"), ("e5", "e5"), ("'1e-5'", "1e-5"), ("[1, no, 2e3]", [1, "no", 2000.0]),
    ],
)  # fmt: skip
def test_a_scalar_is_read_as_a_person_means_it(text: str, value: Any) -> None:
    found = yaml_strict.parse(f"key: {text}", "x")["key"]
    assert (found, type(found)) == (value, type(value))


def test_a_key_that_stands_twice_is_refused_with_its_line() -> None:
    with pytest.raises(RecipeError, match=r"^r\.yaml, line 4: key 'b' twice$"):
        yaml_strict.parse("a:\n  b: 1\n  c: 2\n  b: 3\n", "r.yaml")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a: &x [1]\nb: [" + ", ".join(["*x"] * 21) + "]", "over 20 aliases"),
        ("a: " + "[" * 30 + "]" * 30, "nested deeper than 20"),
        ("[" * 100_000, "nested deeper than 20"),
        ("a: " + "x" * (1 << 20), "larger than 1 MiB"),
        ("a: !!python/object/apply:os.system ['true']", "no tags"),
        ("a: !!python/name:os.system", "no tags"),
        ("a: !mine 3", "no tags"),
        ("a: [1, 2", "line 1"),
        ("a: 1\n---\nb: 2", "another document"),
        ("a: *nothing", "undefined alias"),
        ("&a [*a]", "stands inside an anchor"),
        ("a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]", "stands inside an anchor"),
        ("? [1, 2]\n: 3", "a key must be a word"),
        ("a: \x00", "not YAML"),
        ("a: " + "9" * 5000, "not YAML"),
    ],
)
def test_yaml_that_is_broken_or_hostile_is_refused_in_one_line(text: str, reason: str) -> None:
    with pytest.raises(RecipeError) as caught:
        yaml_strict.parse(text, "r.yaml")
    message = str(caught.value)
    assert message.startswith("r.yaml")
    assert reason in message
    assert "\n" not in message


@pytest.mark.parametrize(
    "value",
    [
        *("1e-5", "1e5", "7", "0x1f", "1_000", "no", "on", "True", "null", "~", "", " x ", ".inf", "1:30", "<<", "=", "- a"),
        *("a: b", "# c", "ünï", "日本", "two\nlines", "tab\there", "quote'\"", "{a}", "*x", "&x", "!t", "%", "@", "`", "007"),
        *(1e-5, 1e22, -0.5, 3.0, 1e300, 0, -12, 10**20, True, False, None),
        *([], {}, [1, [2, {"a": None}]], {"a": {"b": [1.5, "1.5"]}}, ["no", "1e3", 1e3]),
    ],
)  # fmt: skip
def test_what_is_dumped_reads_back_the_same(value: Any) -> None:
    found = yaml_strict.parse(yaml_strict.dump({"key": value}), "x")["key"]
    assert (found, type(found)) == (value, type(value))


# What a recipe may hold


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("tacher.x=1", "unknown key tacher; did you mean 'teacher'?"),
        ("teacher.train.lerning_rate=1e-3", "unknown key teacher.train.lerning_rate; did you mean 'learning_rate'?"),
        ("data.splits.test.form=train", "unknown key data.splits.test.form; did you mean 'from'?"),
        ("student.losses=[{kind: soft, temprature: 2}]", "unknown key student.losses.0.temprature; did you mean 'temperature'?"),
        ("student.losses=[{kind: soft, weight: {start: 1, end: 0, untl: 0.5}}]", "unknown key student.losses.0.weight.untl; did you mean 'until'?"),
        ("teacher.windw=64", "unknown key teacher.windw; did you mean 'window'?"),
        ("student.widht=128", "unknown key student.widht; did you mean 'width'?"),
        ("cache.shards=2", "unknown key cache.shards (there are: dtype, precision, rows_per_shard, splits, tokens_per_batch, tokens_per_shard)"),
        ("teacher.block_size=64", "unknown key teacher.block_size"),
    ],
)  # fmt: skip
def test_an_unknown_key_at_any_depth_is_refused_with_the_nearest(base: str, setting: str, words: str) -> None:
    assert refusal(base, setting).startswith(f"base.yaml: {words}")


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ('teacher.train.learning_rate="1e-5"', "teacher.train.learning_rate: must be a valid number (without quotes), not '1e-5'"),
        ("teacher.train.learning_rate=-1", "teacher.train.learning_rate: must be greater than 0, not -1"),
        ("teacher.train.learning_rate=.inf", "teacher.train.learning_rate: must be a finite number, not inf"),
        ("teacher.train.learning_rate=.nan", "teacher.train.learning_rate: must be a finite number, not nan"),
        ("teacher.train.batch_size=1.5", "teacher.train.batch_size: must be a valid integer, not 1.5"),
        ("teacher.train.freeze_embeddings=yes", "teacher.train.freeze_embeddings: must be a valid boolean, not 'yes'"),
        ("teacher.train=3", "teacher.train: must be a section of keys and values, not 3"),
        ("teacher.train=", "teacher.train: must be a section of keys and values, not null"),
        ("teacher.view=middle", "teacher.view: must be 'head', 'tail', 'head_tail' or 'chunks', not 'middle'"),
        ("teacher.window=wide", "teacher.window: must be a valid integer"),
        ("teacher.window=7", "teacher: window must be even"),
        ("teacher.overlap=400", "teacher: overlap must be less than half of max_length"),
        ("student.width=100", "student.width: must be 128, 256, 512 or 768, not 100"),
        ("student.losses=soft", "student.losses: must be a list"),
        ("student.losses=[]", "student.losses: must have at least 1 item"),
        ("student.losses=[{kind: hard, temperature: 2}]", "student.losses.0: only soft and dkd have a temperature, not hard"),
        ("student.losses=[{kind: mse_logits, temperature: {start: 1, end: 2}}]", "student.losses.0: only soft and dkd have a temperature, not mse_logits"),
        ("student.losses=[{kind: soft, beta: 8}]", "student.losses.0: only dkd has alpha and beta, not soft"),
        ("student.losses=[{kind: soft, temperature: 0}]", "student.losses.0: temperature must be greater than 0"),
        ("student.losses=[{kind: soft, temperature: {start: 4, end: 0}}]", "student.losses.0: temperature must be greater than 0"),
        ("student.losses=[{kind: warm}]", "student.losses.0.kind: must be 'hard', 'soft', 'mse_logits', 'dkd', 'cosine', 'hidden_mse', 'relation' or 'attention', not 'warm'"),
        ("student.losses=[{kind: soft, weight: heavy}]", "student.losses.0.weight: must be a valid number (without quotes), not 'heavy'"),
        ("student.losses=[{kind: soft, weight: -1}]", "student.losses.0.weight: must be greater than or equal to 0, not -1"),
        ("student.losses=[{kind: soft, weight: {start: 1}}]", "student.losses.0.weight.end is missing"),
        ("student.losses=[{kind: soft, weight: {start: 1, end: -2}}]", "student.losses.0.weight.end: must be greater than or equal to 0, not -2"),
        ("student.losses=[{kind: soft, weight: {start: 1, end: 2, shape: round}}]", "student.losses.0.weight.shape: must be 'linear' or 'cosine', not 'round'"),
        ("student.losses=[{kind: soft, weight: {start: 1, end: 2, until: 50}}]", "student.losses.0.weight.until: must be less than or equal to 1, not 50"),
        ("task.labels=[a, 1]", "task.labels.1: must be a valid string, not 1"),
        ("task.labels=[a, b, a]", "task: labels holds 'a' twice"),
        ("task.metric=acuracy", "task.metric: single_label has no metric 'acuracy'; did you mean 'accuracy'?"),
        ("task.metric=micro_f1", "task.metric: single_label has no metric 'micro_f1'"),
        ("data.source=3", "data.source: must be a valid string, not 3"),
        ("data.source={train: 3}", "data.source.train: must be a valid string, not 3"),
        ("data.where={year: null}", "data.where.year: must be"),
        ("data.label=[a, b]", "several label columns need task.kind: multi_label, not single_label"),
        ("data.splits.train={rows: 5, fraction: 0.5}", "data.splits.train: give rows or fraction, not both"),
        ("data.splits.test.fraction=1.5", "data.splits.test.fraction: must be less than 1, not 1.5"),
        ("data.splits.validation=null", "data.splits.validation: must be a section"),
        ("task.class_weights=balancd", "task.class_weights: must be none, balanced or numbers by label, not 'balancd'"),
        ("task.class_weights=[1, 2]", "task.class_weights: must be none, balanced or numbers by label"),
        ("task.labels=[]", "task.labels: must have at least 1 item"),
        ("student.losses=[{kind: soft, weight: 0}, {kind: hard, weight: {start: 0, end: 0}}]", "student: losses: every weight is 0"),
        ("task.class_weights={a: -1}", "task.class_weights.a: must be greater than 0, not -1"),
        ("task.class_weights={a: much}", "task.class_weights.a: must be a valid number (without quotes), not 'much'"),
        ("task.class_weights=3", "task.class_weights: must be"),
        ("task.thresholds=fited", "task.thresholds: must be 'half' or 'fitted', not 'fited'"),
        ("task.thresholds=fitted", "task: thresholds: fitted needs kind: multi_label, not single_label"),
        ("description=", "description: must be a valid string, not null"),
        ("student=tiny", "student: must be a section of keys and values, not 'tiny'"),
        ("teacher.architecture=3", "teacher.architecture: must be one of bert, bigbird, longformer"),
        ("teacher.architecture=null", "teacher.architecture is missing (there are: bert, bigbird, longformer"),
    ],
)  # fmt: skip
def test_a_wrong_value_is_refused_with_its_key_and_what_fits(base: str, setting: str, words: str) -> None:
    assert refusal(base, setting).startswith(f"base.yaml: {words}")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            ["task.kind=regression", "student.train.label_smoothing=0.1"],
            "student.train.label_smoothing has no meaning",
        ),
        (
            ["task.kind=regression", "teacher.train.label_smoothing=0.1"],
            "teacher.train.label_smoothing has no meaning",
        ),
        (
            ["task.kind=multi_label", "student.losses=[{kind: hard}, {kind: dkd}]"],
            "student.losses.1: dkd needs one right class for each row, which task.kind: multi_label does not have; take kind: soft",
        ),
        (
            ["student.losses=[{kind: hard}, {kind: cosine}]", "student.engine=stock"],
            "student.losses.1: cosine compares layers, and engine: stock shows no layers; take kind: soft, or engine: packed",
        ),
        (
            ["student.losses=[{kind: cosine, layer_map: last}]"],
            "student.losses.0: layer_map is of hidden_mse and attention, not of cosine",
        ),
        (
            ["student.losses=[{kind: soft, relation_heads: 4}]"],
            "student.losses.0: relation_heads is of relation, not of soft",
        ),
        (
            ["student.losses=[{kind: hidden_mse, layer_map: first}]"],
            "student.losses.0.layer_map: must be 'uniform' or 'last', not 'first'",
        ),
        (
            ["student.losses=[{kind: hidden_mse, layer_map: [[1]]}]"],
            "student.losses.0.layer_map.0: must have at least 2 items",
        ),
        (
            ["student.losses=[{kind: hidden_mse, layer_map: [[1, -2]]}]"],
            "student.losses.0.layer_map.0.1: must be greater than or equal to 0, not -2",
        ),
        (
            ["student.losses=[{kind: attention, layer_map: [[0, 1]]}]"],
            "student.losses.0: layer_map: the embeddings (0) have no attention",
        ),
        (
            ["task.kind=regression", "student.losses=[{kind: dkd}]"],
            "student.losses.0: dkd needs one right class",
        ),
        (
            ["task.kind=regression", "student.calibrate=true"],
            "student.calibrate has no meaning for task.kind: regression",
        ),
        (
            ["student.calibrate=true", "cache.splits=[train]"],
            "student.calibrate needs the teacher's logits of validation; add it to cache.splits",
        ),
        (
            ["task.kind=regression", "task.class_weights=balanced"],
            "task: class_weights has no meaning for kind: regression",
        ),
        (
            ["task.kind=regression", "task.thresholds=fitted"],
            "task: thresholds: fitted needs kind: multi_label",
        ),
        (
            ["task.labels=[toxic, mild]", "task.class_weights={toxc: 2}"],
            "task: class_weights: no label 'toxc'; did you mean 'toxic'?",
        ),
        (
            ["cache.splits=[validation]"],
            "student.losses need the teacher's logits of train; add it to cache.splits",
        ),
        (
            ["cache.splits=[train]", "data.transfer=[{source: a.txt}]"],
            "student.losses need the teacher's logits of transfer",
        ),
        (["task.kind=regression", "task.labels=[a, b]"], "task: labels: a number to predict has no classes"),
        (["data.label_separator=';'"], "data.label_separator needs task.kind: multi_label, not single_label"),
        (["data.text_pair=text"], "data: text and text_pair are both 'text'"),
        (["data.text_pair=b", "student.view=head_tail"], "text pairs are read with view: head"),
        (["data.label=[a, a]", "task.kind=multi_label"], "data: label holds 'a' twice"),
        (["tacher=1", "cahce=2"], "unknown key tacher; did you mean 'teacher'? (and 1 more)"),
    ],
)
def test_parts_that_do_not_fit_each_other_are_refused(base: str, settings: list[str], words: str) -> None:
    assert refusal(base, *settings).startswith(f"base.yaml: {words}")


def test_a_term_that_compares_layers_is_refused_for_a_student_without_any(base: str) -> None:
    message = refusal(base, "student.losses=[{kind: relation}]", student="tfidf")
    assert (
        message
        == "base.yaml: student.losses.0: relation compares layers, and tfidf has no layers; take kind: soft"
    )


def test_a_wrong_setting_is_refused(base: str) -> None:
    assert "must be key=value" in refusal(base, "teacher.train.epochs")
    assert "must be key=value" in refusal(base, "=3")
    assert "empty key" in refusal(base, "teacher..epochs=3")
    assert "architecture is not a section" in refusal(base, "teacher.architecture.x=3")


@pytest.mark.parametrize("key", ["2.kind", "kind", "-1.kind", "2", "x"])
def test_an_item_that_a_list_has_not_is_refused_with_those_that_it_has(base: str, key: str) -> None:
    losses = "student.losses=[{kind: hard}, {kind: soft}]"
    assert refusal(base, losses, f"student.losses.{key}=soft") == (
        f"--set student.losses.{key}=soft: losses is a list of items 0 to 1: losses.0 sets one of them, losses=[…] the whole"
    )
    assert "losses is a list of no items" in refusal(base, "student.losses=[]", "student.losses.0.kind=soft")


def test_an_item_of_a_list_is_set_by_its_number_and_its_neighbours_stay(base: str) -> None:
    losses = "student.losses=[{kind: soft, temperature: 2}, {kind: hard, weight: 0.5}]"
    found = recipe.load(
        base, [losses, "student.losses.0.temperature=4", "task.labels=[a, b]", "task.labels.1=c"]
    )
    assert [(one.kind, one.temperature, one.weight) for one in found.student.losses] == [
        ("soft", 4.0, 1.0),
        ("hard", 1.0, 0.5),
    ]
    assert found.task.labels == ["a", "c"]


def test_an_item_of_a_list_that_is_not_written_in_the_recipe_is_refused(base: str) -> None:
    for setting in ("student.losses.0.temperature=4", "student.losses.0=4"):
        assert refusal(base, setting) == (
            f"--set {setting}: losses is not written in the recipe, so it has no item 0; set it as a whole: losses=[…]"
        )


@pytest.mark.parametrize(("text", "rate"), [("3e-5", 3e-5), ("1", 1.0), ("0.001", 0.001)])
def test_a_setting_is_typed_by_the_schema(base: str, text: str, rate: float) -> None:
    found = recipe.load(base, [f"teacher.train.learning_rate={text}"])
    assert found.teacher.train.learning_rate == rate
    assert isinstance(found.teacher.train.learning_rate, float)


def test_settings_apply_in_order_and_leave_their_neighbours(base: str) -> None:
    found = recipe.load(base, ["student.train.epochs=5", "student.train.seed=1", "student.train.seed=2"])
    assert (found.student.train.epochs, found.student.train.seed) == (5.0, 2)
    assert found.student.train.batch_size == Train().batch_size


def test_a_missing_part_is_named(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump({k: v for k, v in BASE.items() if k != "data"}))
    assert refusal(str(path)) == "r.yaml: data is missing"
    path.write_text(yaml.safe_dump({k: v for k, v in BASE.items() if k != "teacher"}))
    assert refusal(str(path)).startswith("r.yaml: teacher.architecture is missing")


@pytest.mark.parametrize("content", [b"", b"- a\n- b\n", b"hello"])
def test_a_recipe_that_is_no_mapping_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes(content)
    assert refusal(str(path)) == "r.yaml: a recipe is a mapping of keys to values"


def test_a_recipe_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes(b"description: caf\xe9\n")
    assert "r.yaml: cannot be read" in refusal(str(path))


def test_unknown_names_come_with_the_nearest(base: str) -> None:
    assert "no recipe called 'quickstrat'; did you mean 'quickstart'?" in refusal("quickstrat")
    assert "did you mean 'base.yaml'?" in refusal(base.replace("base.yaml", "bse.yaml"))
    assert refusal(base, "teacher.architecture=longfomer") == (
        "base.yaml: teacher.architecture: no teacher called 'longfomer'; did you mean 'longformer'?"
    )
    assert "no student called 'tf-idf'; did you mean 'tfidf'?" in refusal(base, "student.architecture=tf-idf")
    assert "no teacher called '_plain'" in refusal(base, "teacher.architecture=_plain")
    with pytest.raises(UsageError, match="no student called 'bert_tinny'; did you mean 'bert_tiny'"):
        recipe.load(base, student="bert_tinny")


# Extending and replacing


def write(folder: Path, name: str, **keys: Any) -> str:
    path = folder / name
    path.write_text(yaml.safe_dump(keys))
    return str(path)


def test_extends_merges_mappings_and_replaces_the_rest(base: str, tmp_path: Path) -> None:
    write(tmp_path, "middle.yaml", extends="base.yaml", teacher={"window": [4, 4], "train": {"epochs": 2}})
    top = write(
        tmp_path, "top.yaml", extends="middle.yaml", teacher={"window": [8], "train": {"seed": 5}}, description="top"
    )  # fmt: skip
    found: Any = recipe.load(top)
    assert found.description == "top"
    assert found.teacher.window == [8]
    assert (found.teacher.train.epochs, found.teacher.train.seed) == (2.0, 5)
    assert found.data.source == "rows.csv"


def test_extends_takes_a_shipped_recipe(tmp_path: Path) -> None:
    own = write(tmp_path, "own.yaml", extends="quickstart", description="own", student={"max_length": 64})
    found, shipped = recipe.load(own), recipe.load("quickstart")
    assert found.student.max_length == 64
    assert found.model_copy(update={"description": "", "student": None}).model_dump() == (
        shipped.model_copy(update={"description": "", "student": None}).model_dump()
    )


def test_a_cycle_of_extends_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "a.yaml", extends="b.yaml")
    write(tmp_path, "b.yaml", extends="a.yaml")
    assert "a.yaml: extends itself by way of a.yaml -> b.yaml" in refusal(str(tmp_path / "a.yaml"))
    assert "extends itself" in refusal(write(tmp_path, "c.yaml", extends="c.yaml"))


def test_a_recipe_that_extends_nothing_real_says_so(tmp_path: Path) -> None:
    assert refusal(write(tmp_path, "a.yaml", extends="quickstrat")).startswith(
        "a.yaml: extends: no recipe called"
    )
    assert "must be one recipe's name" in refusal(write(tmp_path, "b.yaml", extends=["quickstart"]))


def test_another_student_keeps_losses_view_and_training_and_drops_the_old_ones_fields(
    base: str,
) -> None:
    settings = [
        "student.max_length=64", "student.view=tail", "student.train.epochs=7",
        "student.losses=[{kind: soft, temperature: 4}]",
    ]  # fmt: skip
    own = recipe.load(base, settings)
    path = Path(base).with_name("own.yaml")
    path.write_text(own.dump())
    found: Any = recipe.load(str(path), student="distilbert")
    assert found.student.architecture == "distilbert"
    assert found.student.checkpoint == "distilbert/distilbert-base-uncased"
    assert not hasattr(found.student, "width")
    for field in ("losses", "train", "view", "max_length", "ensemble"):
        assert getattr(found.student, field) == getattr(own.student, field), field


def test_a_preset_brings_its_sizes_and_a_setting_has_the_last_word(base: str) -> None:
    found: Any = recipe.load(base, ["student.max_length=32"], student="bert_small")
    assert (found.student.layers, found.student.width) == (4, 512)
    assert found.student.checkpoint == "google/bert_uncased_L-4_H-512_A-8"
    assert found.student.max_length == 32


@pytest.mark.parametrize("name", sorted(catalog.presets()))
def test_every_student_name_fits_a_recipe_without_one_of_its_own(base: str, name: str) -> None:
    path = Path(base)
    path.write_text(yaml.safe_dump({k: v for k, v in BASE.items() if k != "student"}))
    assert recipe.load(base, student=name).student.architecture == catalog.presets()[name]["architecture"]


# The recipes that ship


@pytest.mark.parametrize("name", sorted(catalog.recipes()))
class TestShipped:
    def test_is_valid_and_is_described(self, name: str) -> None:
        assert recipe.load(name).description == recipe.descriptions()[name]
        assert recipe.descriptions()[name].strip()

    def test_begins_with_the_command_that_runs_it(self, name: str) -> None:
        first = catalog.recipes()[name].read_text(encoding="utf-8").splitlines()[0]
        assert first.startswith(f"# distill teacher --recipe {name}")

    def test_resolved_dump_reads_back_to_an_equal_recipe(self, name: str) -> None:
        found = recipe.load(name)
        again = recipe.build(yaml_strict.parse(found.dump(), "dump"), "dump")
        assert again.model_dump() == found.model_dump()
        assert again.dump() == found.dump()


def test_losses_that_are_set_on_the_command_line_read_back_from_a_dump(base: str) -> None:
    losses = (
        "[{kind: dkd, temperature: 4, alpha: 0.5, beta: 8}, "
        "{kind: soft, weight: {start: 1, end: 0.2, shape: cosine, until: 0.5}, temperature: {start: 4, end: 1}}, "
        "{kind: hard, weight: 0.5}]"
    )
    settings = [f"student.losses={losses}", "student.calibrate=true", "student.train.log_gradient_norms=true"]
    found = recipe.load(base, settings)
    decoupled, soft, _ = found.student.losses
    assert (decoupled.temperature, decoupled.alpha, decoupled.beta) == (4.0, 0.5, 8.0)
    assert soft.weight == Schedule(start=1.0, end=0.2, shape="cosine", until=0.5)
    assert soft.temperature == Schedule(start=4.0, end=1.0)
    again = recipe.build(yaml_strict.parse(found.dump(), "dump"), "dump")
    assert again.student == found.student
    assert again.dump() == found.dump()
    # A saved model's settings, and the baseline's, are plain values that are checked again.
    schema = type(found.student)
    assert schema.model_validate(found.student.model_dump(mode="json")) == found.student


def test_a_dump_keeps_labels_that_look_like_numbers(base: str) -> None:
    found = recipe.load(base, ["task.labels=['1e5', '7', 'no', '']"])
    again = recipe.build(yaml_strict.parse(found.dump(), "dump"), "dump")
    assert again.task.labels == ["1e5", "7", "no", ""]


@pytest.mark.parametrize("field", ["description", "teacher"])
def test_a_recipe_does_not_change_once_read(base: str, field: str) -> None:
    found = recipe.load(base)
    with pytest.raises(ValueError, match="frozen"):
        setattr(found, field, None)
