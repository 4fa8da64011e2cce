"""Random tiny checkpoints and random inputs for them, each a function of its number alone."""

import numpy as np

from tests.parity.oracle import Video, build, hf_config, text_config, vision_config

KINDS = ("text", "image", "images", "batch", "video", "videos and images", "thin", "smallest")
SECONDS = (1 / 12, 2 / 15, 0.5, 1.0, 2 / 3, 4.0)


def draw_oracle(number, folder, scale=3):
    """Depth, widths, heads, KV heads, window, full-attention layers, sections, tied or not."""
    rng = np.random.default_rng(number)

    def pick(*choices):
        return choices[rng.integers(len(choices))]

    heads, half = pick(2, 4, 6), pick(4, 6, 8)
    cuts = np.sort(rng.choice(np.arange(1, half), 2, replace=False))
    depth, vision_heads, patch = pick(1, 2, 3, 4, 6), pick(1, 2, 4), pick(2, 4)
    text = {
        "hidden_size": heads * 2 * half,
        "intermediate_size": pick(40, 96),
        "num_hidden_layers": pick(1, 2, 3),
        "num_attention_heads": heads,
        "num_key_value_heads": pick(*(k for k in range(1, heads + 1) if heads % k == 0)),
        "rms_norm_eps": pick(1e-6, 1e-5),
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": pick(1e4, 1e6),
            "mrope_section": np.diff([0, *cuts, half]).tolist(),
        },
    }
    vision = {
        "depth": depth,
        "hidden_size": vision_heads * pick(4, 8, 12),
        "intermediate_size": pick(24, 80),
        "num_heads": vision_heads,
        "out_hidden_size": text["hidden_size"],
        "patch_size": patch,
        "window_size": patch * 2 * pick(1, 2, 3, 4),
        "fullatt_block_indexes": np.flatnonzero(rng.random(depth) < 0.4).tolist(),
        "tokens_per_second": pick(1, 2, 4, 25),
    }
    config = hf_config(text_config(**text), vision_config(**vision), tied=bool(pick(0, 1)))
    return build(config, folder, scale, seed=number)


def draw_rows(number, kind):
    """Rows of images and videos of the kind, or of all, as `Oracle.inputs` takes them."""
    rng = np.random.default_rng(number)

    def image(most=7):
        rows, columns = 2 * rng.integers(1, most, 2)
        return 1, int(rows), int(columns)

    def video():
        _, rows, columns = image(most=4)
        return Video(int(rng.integers(1, 5)), rows, columns, SECONDS[rng.integers(len(SECONDS))])

    rows = {
        "text": [(), (), ()],
        "image": [(image(),)],
        "images": [(image(), image(), image())],
        "batch": [(image(), image()), (), (image(),)],
        "video": [(video(),)],
        "videos and images": [(image(), video()), (video(), image(), video())],
        "thin": [
            ((1, 2, int(2 * rng.integers(12, 24))),),
            ((1, int(2 * rng.integers(12, 24)), 2),),
        ],
        "smallest": [((1, 2, 2),)],
    }
    return [row for name in KINDS for row in rows[name]] if kind == "all" else rows[kind]
