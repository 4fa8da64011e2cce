import re

import pytest

from configs import base, quickstart
from vtriune_jax import config as configs
from vtriune_jax.config_tables import FREE
from vtriune_jax.errors import UserError

BASE = "configs/base.py"


def fails(function, *args) -> str:
    with pytest.raises(UserError) as caught:
        function(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("path", sorted(configs.BASE.parent.glob("*.py")), ids=lambda p: p.stem)
def test_every_shipped_config_is_sound(path):
    assert configs.load(str(path)).seed == 0


def test_each_number_and_tuple_of_base_has_one_rule():
    for key, value in configs.flatten(base.get_config()).items():
        needed = not isinstance(value, str | bool)
        assert configs.rule(key) or not needed, key


def test_each_line_of_the_tables_names_keys_of_base():
    keys = configs.flatten(base.get_config())
    for pattern in [*(pattern for pattern, _, _ in configs.RULES), FREE]:
        assert any(re.fullmatch(pattern, key) for key in keys), pattern
    related = [key for sides in configs.DIVISIBLE for side in sides for key in side]
    related += [key for _, _, line in configs.RELATIONS for key in line]
    assert set(related) <= set(keys)


def test_overrides_are_read_as_the_type_of_base():
    config = configs.load(
        BASE,
        [
            ("grpo.lr", "1"),
            ("grpo.steps", "7"),
            ("data.cot_prompts", "False"),
            ("stages", "grpo"),
            ("data.heldout", "a.parquet,digits/ocr"),
            ("data.train", "(('my rows.parquet', 2), ('digits/ocr', 1.5))"),
            ("model.path", "7"),
            ("sft.freeze", "('^visual/', 'embed{1,2}')"),
            ("verifiers.addresses", "()"),
            ("grpo.steps", "8"),
        ],
    )
    assert config.grpo.lr == 1.0
    assert isinstance(config.grpo.lr, float)
    assert config.grpo.steps == 8
    assert config.data.cot_prompts is False
    assert config.stages == ("grpo",)
    assert config.data.heldout == ("a.parquet", "digits/ocr")
    assert config.data.train == (("my rows.parquet", 2), ("digits/ocr", 1.5))
    assert config.model.path == "7"
    assert config.sft.freeze == ("^visual/", "embed{1,2}")
    assert config.verifiers.addresses == ()


def test_all_mistakes_of_file_and_command_line_come_in_one_line(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "from configs import base\n"
        "def get_config():\n"
        "    config = base.get_config()\n"
        "    config.grpo.sample = 4\n"
        "    config.sft.lr = 'fast'\n"
        "    config.checkpoint.keep = True\n"
        "    del config.seed\n"
        "    return config\n"
    )
    text = fails(configs.load, str(path), [("data.tarin", "x"), ("grpo.steps", "many")])
    assert text.startswith(
        f"{path} has 6 mistakes: (1) data.tarin is not a key: did you mean data."
    )
    for part in (
        "grpo.sample is not a key: did you mean grpo.samples?",
        "sft.lr='fast' must be of type float, not str",
        "checkpoint.keep=True must be of type int, not bool",
        "grpo.steps='many' must be of type int, not str",
        "seed is missing",
    ):
        assert part in text


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("lr", "did you mean grpo.lr or sft.lr?"),
        ("grpo.learning_rate", "the group has grpo.advantage, grpo.betas"),
        ("grop.xyz", "did you mean grpo."),
        ("sft", "sft is a group of keys: set sft.betas"),
        ("grpo.lr.decay", "did you mean grpo.lr?"),
        ("model.tiny.hiden", "did you mean model.tiny.hidden?"),
    ],
)
def test_an_unknown_key_is_answered_with_the_nearest(key, expected):
    message = fails(configs.load, BASE, [(key, "1")])
    assert key in message
    assert expected in message


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("grpo.lr", "-1", "above 0"),
        ("grpo.lr", "inf", "above 0"),
        ("grpo.clip_low", "1.5", "above 0 and at most 1"),
        ("grpo.samples", "1", "at least 2"),
        ("grpo.betas", "0.9", "two numbers in [0, 1)"),
        ("grpo.freeze", "('(',)", "regular expressions"),
        ("stages", "sft,sft", "each once"),
        ("stages", "rl", "each once"),
        ("model.dtype", "fp16", 'one of "float32", "bfloat16"'),
        ("data.train", "my.parquet", "(source, weight above 0) pairs"),
        ("data.train", "()", "(source, weight above 0) pairs"),
        ("data.cot_prompts", "maybe", "must be of type bool"),
        ("mesh.fsdp", "0", "or -1 for the rest"),
        ("log.seconds", "-1", "0 or more"),
        ("data.min_pixels", "9999999", "must not exceed data.max_pixels=4194304"),
        ("grpo.minibatches", "7", "choose grpo.prompts=1022 or 1029"),
        ("grpo.clip_high", "inf", "above 0, and finite"),
        ("grpo.loss", "ppo", 'one of "grpo", "gspo", "cispo"'),
        ("grpo.advantage", "gae", '"reinforce++_baseline"'),
        ("grpo.normalise", "batch", 'one of "token", "sequence", "dr"'),
        ("grpo.kl", "k4", 'one of "k1", "k2", "k3", "mse"'),
        ("grpo.dual_clip", "0.5", "0 (off) or above 1"),
        ("grpo.tis_cap", "-1", "0 (off) or more"),
        ("grpo.epochs", "0", "above 0"),
        ("grpo.overlong_cushion", "4096", "must not exceed batch.completion_tokens=2048"),
        ("grpo.minibatches", "2048", "a group stays in one minibatch"),
        ("model.tiny.mrope_section", "(4, 4, 4)", "must sum to half a head"),
        ("model.tiny.window_size", "50", "a multiple of 28"),
        ("model.tiny.full_attention_layers", "4", "below model.tiny.vision_depth=4"),
        ("verifiers.mode", "in_process", None),
        ("mesh.data", "-1", "at most one can be -1"),
    ],
)
def test_values_out_of_range_are_named_with_what_is_right(key, value, expected):
    if expected is None:
        assert configs.load(BASE, [(key, value)])
        return
    message = fails(configs.load, BASE, [(key, value)])
    assert key in message
    assert expected in message


def test_addresses_that_would_do_nothing_are_a_mistake():
    config = base.get_config()
    config.verifiers.update(mode="in_process", addresses=("http://host:1",))
    assert 'needs verifiers.mode="server"' in fails(configs.check, config)


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"dual_clip": 3.0, "loss": "cispo"}, "grpo.dual_clip=3.0 does nothing with grpo.loss="),
        ({"tis_cap": 2.0, "old": "rollout", "epochs": 2}, 'needs grpo.old="recomputed"'),
        ({"refill": 1, "advantage": "reinforce++"}, "refill=1 must be 0 with grpo.advantage='rein"),
        ({"epochs": 2, "top_p": 0.9}, "needs top_p=1 and top_k=0, not grpo.top_p=0.9"),
    ],
)
def test_parts_of_the_family_that_contradict_each_other(keys, expected):
    config = base.get_config()
    config.grpo.update(keys)
    assert expected in fails(configs.check, config)


def test_check_judges_a_config_made_in_python():
    config = quickstart.get_config()
    configs.check(config)
    config.sft.prompts = 5
    config.batch.micro_batches = 2
    assert fails(configs.check, config).startswith("the config: sft.prompts=5 is not divisible")
    config.stages = ("grpo",)
    configs.check(config)  # what is not there has no rows


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("quickstrat.py", None, "did you mean configs/quickstart.py?"),
        ("empty.py", "", "has no get_config()"),
        ("syntax.py", "import os\ndef get_config(:\n", "syntax.py line 2: SyntaxError: invalid"),
        ("import.py", "from configs import bse\n", "import.py line 1: ImportError: cannot import"),
        ("name.py", "def get_config():\n    return a\n", "name.py line 2: NameError: name 'a'"),
        ("none.py", "def get_config():\n    pass\n", "get_config() returns None, expected the"),
        ("more.py", "def get_config(x):\n    pass\n", "more.py: TypeError: get_config() missing"),
        (
            "group.py",
            "from configs import base\n"
            "def get_config():\n    c = base.get_config()\n    c.grpoo.lr = 1\n    return c\n",
            "group.py line 4: AttributeError: 'grpoo' Did you mean \"grpo\" instead of",
        ),
        ("notes.txt", "hello", "is not a Python file"),
    ],
)
def test_a_file_that_is_no_config(tmp_path, name, content, expected):
    path = tmp_path / name
    if content is not None:
        path.write_text(content)
    message = fails(configs.load, str(path))
    assert str(path) in message
    assert expected in message


def test_a_config_is_found_from_any_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert configs.load(str(configs.REPOSITORY / "configs/quickstart.py"))
