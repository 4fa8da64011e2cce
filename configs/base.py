"""Every key of a run, what it means, and V-Triune's value where its paper gives one.

Other configs start from here and set what differs:

    from configs import base

    def get_config():
        config = base.get_config()
        config.grpo.lr = 5e-7
        return config

Any key can be set from the command line too: `--config.grpo.lr=5e-7 --config.stages=sft,grpo`, and
pairs as Python writes them: `--config.data.train="(('digits/ocr', 2.0), ('my.parquet', 1.0))"`.
Before anything starts, `vtriune_jax.config` compares a config with this one and reports unknown
keys, values of another type, numbers out of range and sizes that do not divide, all at once.
"""

from typing import Any

from ml_collections import ConfigDict

DIGITS = (
    "digits/counting",
    "digits/ocr",
    "digits/math",
    "digits/detection",
    "digits/grounding",
)
"""The built-in sources."""


def get_config() -> Any:
    """The defaults, a ConfigDict (of type Any, so that type checkers let its keys pass).

    It is not type-safe: `vtriune_jax.config` complains of all wrong values together.
    """
    config: dict[str, Any] = dict(
        # Everything random is derived from this number, the step and the sample.
        seed=0,
        # What to run, in this order: "sft" imitates demonstrations (bare ground truths, where rows
        # have none), "grpo" learns from rewards.
        stages=("sft", "grpo"),
    )
    config["model"] = dict(
        # A checkpoint folder in the Hugging Face layout; "" builds the tiny model below.
        path="",
        # Of activations: "float32" or "bfloat16". Parameters and optimizer are always float32.
        dtype="float32",
        # What is kept of a layer for the backward pass: "none" recomputes nothing, "dots" keeps the
        # results of linear maps and attention, the fastest on CPUs, "attention" the latter only,
        # "full" the layer's input only.
        remat="dots",
        # True compiles every layer instead of one for a loop over them: it takes longer, and saves
        # GPUs the copying of what is kept to a stack and back. No use on CPUs.
        unroll=False,
        # What computes attention: "splash" (TPUs), "cudnn" (NVIDIA GPUs, bfloat16; Triton's for
        # packed rows), "triton" (GPUs), "xla" (anywhere, CPUs too). "auto" takes the fastest that
        # devices and type allow.
        attention="auto",
        # Low-rank adapters of the language layers: at rank 0 there are none; above it they alone
        # are trained and saved in checkpoints, all else stays as it was. Models that are written
        # are ordinary ones, with the adapters put into their matrices. Adapters bear, and want, a
        # learning rate some ten times higher than the same model without.
        lora=dict(
            rank=0,
            alpha=32.0,  # a matrix W becomes W + alpha / rank · A·B
            # Regular expression, searched in the names of a layer's matrices, which are attn/q,
            # attn/k, attn/v, attn/o, mlp/gate, mlp/up and mlp/down.
            target="attn/|mlp/",
            # Of the matrices that are not trained. "bfloat16" halves their memory, and changes
            # nothing if the checkpoint's files are bfloat16 and dtype above is too.
            base_dtype="float32",
        ),
        # Sizes of the tiny model, read when path is "".
        tiny=dict(
            vocab_size=1024,  # tokens, special ones included; the tokenizer is trained to fit
            hidden=128,  # width of the decoder
            intermediate=384,  # width of its MLP
            layers=4,
            heads=4,  # query heads; divides hidden
            kv_heads=2,  # key and value heads; divides heads
            mrope_section=(4, 6, 6),  # frequencies of time, height, width: half of hidden / heads
            tie=True,  # the output head is the transposed embedding
            vision_hidden=64,  # width of the vision tower
            vision_intermediate=192,  # width of its MLP
            vision_depth=4,  # its layers
            vision_heads=2,  # divides vision_hidden
            window_size=56,  # pixels along a window of the local layers, a multiple of 28
            full_attention_layers=(3,),  # layers (from 0) in which a patch sees its whole image
        ),
    )
    config["data"] = dict(
        # (source, weight) pairs: rows are drawn in proportion to the weights. A source is a parquet
        # file, a folder or glob of them, a Hugging Face data set, or built in (digits/…).
        train=tuple((source, 1.0) for source in DIGITS),
        # Sources whose held-out rows are scored before and after GRPO.
        heldout=DIGITS,
        # Images with less or more pixels are resized; replaces the limits of the checkpoint.
        min_pixels=512 * 512,
        max_pixels=2048 * 2048,
        # Append a random request for reasoning to prompts whose verifier is mathverify.
        cot_prompts=True,
        # A row that cannot be read or is larger than its slot in the batch: "error" stops the run,
        # "skip" counts it (metric skipped_rows) and takes the next one.
        on_bad_row="error",
        # Threads that decode images and make prompts, ahead of the step that needs them.
        threads=8,
        # Folder in which the built-in sources are written as parquet; ~ is the home directory.
        cache="~/.cache/vtriune_jax/data",
    )
    config["batch"] = dict(
        # Tokens of a row's prompt slot, image tokens included.
        prompt_tokens=8192,
        # Tokens of a row's completion slot; longer completions are cut and count as truncated.
        completion_tokens=2048,
        # Windows of the vision tower per row: ⌈h/112⌉·⌈w/112⌉ for an image of h×w pixels, if the
        # window size is 112 (as in the released models). 0 where no row has an image.
        windows=400,
        # An update goes through its rows in this many pieces, and the vision tower through images,
        # to save memory; same result. Where there are fewer groups than pieces and devices, a group
        # is cut into several rows.
        micro_batches=1,
        # Rows of an update: "single" ones are a prompt and one completion, "group" ones a prompt
        # and all its completions, "packed" ones as many sequences as fit into a single one's
        # length; "auto" takes what is least work, batch by batch. Same result.
        layout="auto",
    )
    config["sft"] = dict(
        steps=100,  # updates
        prompts=32,  # rows per update
        lr=1e-5,  # learning rate after the warm-up, constant
        warmup_steps=5,  # updates over which it rises linearly
        weight_decay=0.01,
        betas=(0.9, 0.999),  # of AdamW
        mu_dtype="float32",  # of its first moment; "bfloat16" halves that one's memory
        grad_clip=1.0,  # largest global norm of the gradient
        freeze=(),  # regular expressions, searched in parameter paths; what matches stays as it is
    )
    config["grpo"] = dict(
        steps=138,  # rollout batches (V-Triune: 3 epochs of 46)
        prompts=1024,  # prompts per step
        samples=8,  # completions per prompt: the group in which advantages are normalised
        epochs=1,  # times that the completions of a step are gone through …
        minibatches=1,  # … in so many updates each (V-Triune off-policy: 8, at lr 5e-7)
        lr=1e-6,
        warmup_steps=7,  # of all updates: a step has epochs × minibatches of them
        weight_decay=0.01,
        betas=(0.9, 0.999),
        mu_dtype="float32",
        grad_clip=1.0,
        freeze=("^visual/",),  # the vision tower and its merger: training them is unstable
        # Methods are combinations of the keys below. GRPO as published: normalise="sequence"; DAPO:
        # the defaults and refill, overlong_cushion; Dr.GRPO: advantage="dr_grpo", normalise="dr";
        # GSPO: loss="gspo", normalise="sequence" and small clips.
        # What a completion's reward is compared with, and scaled by: "grpo" mean and spread of its
        # group, "dr_grpo" the mean only, "rloo" the mean of the others, "reinforce++" mean and
        # spread of the batch, "reinforce++_baseline" mean of the group, spread of the batch.
        advantage="grpo",
        # "grpo" clips the ratio of each token, "gspo" that of the completion (wants clips of about
        # 3e-4), "cispo" only the weight of a token's gradient (clip_low=1.0 leaves it open below).
        loss="grpo",
        # What weighs the same: each "token", each completion ("sequence"), or as in Dr.GRPO ("dr")
        # each token, but divided by the completion slots instead of the tokens in them.
        normalise="token",
        clip_low=0.2,  # the probability ratio is clipped below 1 - clip_low …
        clip_high=0.28,  # … and above 1 + clip_high
        dual_clip=0.0,  # largest ratio that counts at negative advantages, as 3.0; 0.0 is off
        # The ratio, where a step has several updates, is to log-probs that are "recomputed" before
        # the first one, or to those of the "rollout", which saves a pass.
        old="recomputed",
        # Truncated importance sampling: each token weighs trainer's / sampler's probability, at
        # most this; 2.0 is usual where the sampler is another program. 0.0 is off.
        tis_cap=0.0,
        # Penalty on the distance from the model that the stage starts with (with LoRA: from the
        # base), by the estimator "k1" (whose gradient is 0 on average), "k2", also called "mse", or
        # "k3". 0.0 is off.
        kl_weight=0.0,
        kl="k3",
        entropy_weight=0.0,  # of the entropy, as a bonus
        # The last so many tokens of the completion slot cost reward, up to 1; 0 is off.
        overlong_cushion=0,
        # Dynamic sampling: groups of equal rewards are dropped, and up to so many more rounds of
        # prompts drawn to replace them; 0 keeps them.
        refill=0,
        temperature=1.0,  # of sampling
        top_p=1.0,  # sample from the fewest tokens that have this probability; 1.0 is off
        top_k=0,  # sample from this many best tokens; 0 is off
    )
    config["rollout"] = dict(
        # Who samples: "local", this process with the trainer's devices, or "sglang", a fleet of
        # servers (docs/rollouts.md).
        engine="local",
        # Of "sglang": the servers, as ("http://host:30000",), or a file that lists them, as
        # ("runs/fleet/addresses",), which is read again and again: servers may come and go.
        addresses=(),
        # Of "local": prompts are completed in up to so many parts, one after the other, as the keys
        # and values of all tokens of a part are in memory at once. Same result.
        pieces=1,
        # Updates that may pass between sampling and training: at 0 every step samples from the
        # parameters that it trains, at 1 the next step's completions are begun before the update,
        # at n those of n steps are on their way. Above 0 wants grpo.tis_cap, as 2.0.
        ahead=0,
        # Prompts that are asked in a step beyond those it needs, as a part of them: the last ones
        # to end are interrupted and come first in the next step.
        over_sampling=0.0,
        # Versions of the weights that the tokens of an interrupted completion may be behind to be
        # continued; older ones are drawn anew, with 0 all of them.
        carry=0,
        deadline_seconds=3600.0,  # for the completions of a step; then the run ends with an error
        # Folder for the weights that servers load, new after every update: memory (/dev/shm/…), a
        # fast disk, or one that all machines share; "" is the workdir's …
        weights_folder="",
        weights_folder_there="",  # … and its name on the servers, if it is another
        weights_dtype="bfloat16",  # of these files
        # After every update the servers' log-probs of so many fixed completions are compared with
        # the trainer's; the run ends if their mean distance is above this. 0 prompts: never.
        probe_prompts=4,
        probe_gap=0.1,
    )
    # Devices along each axis of the mesh; one of the three may be -1, "the rest".
    config["mesh"] = dict(
        data=1,  # copies of the parameters
        fsdp=-1,  # parts that parameters, optimizer state and rows are cut into
        tensor=1,  # parts that matrix products are cut into
    )
    config["verifiers"] = dict(
        # "server": an HTTP service, asked asynchronously; "in_process": a function call.
        mode="server",
        # Servers that run already, as ("http://host:port",); () starts one on this machine.
        addresses=(),
        workers=2,  # processes that judge, of the server that is started or of "in_process"
        timeout_seconds=5.0,  # per completion; a late one is masked, never scored 0
        # From question to verdict, waiting and repetitions at other servers included; completions
        # that no server has judged by then are masked.
        deadline_seconds=300.0,
    )
    config["eval"] = dict(
        rows_per_source=64,  # held-out rows that are scored; 0 leaves the evaluation out
        batch=64,  # prompts that are completed together, at least: a multiple of the devices
        temperature=0.0,  # of sampling; 0.0 is greedy
        # IoU that boxes must reach in evaluations, fixed so that before and after compare; in
        # training it rises with progress: 0.85, 0.95, 0.99.
        iou_threshold=0.5,
    )
    config["checkpoint"] = dict(
        every=5,  # steps; the last one of a stage is saved in any case
        keep=2,  # so many of the newest stay on disk
    )
    config["log"] = dict(
        seconds=5.0,  # between two lines of progress; metrics.jsonl gets every step
        samples=2,  # held-out samples per source that are drawn in the report
    )
    return ConfigDict(config, type_safe=False)
