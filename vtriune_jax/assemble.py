"""Config → the parts a run is made of: model, data, engine, verifiers, mesh."""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Float

from vtriune_jax import hosts, models, sharding
from vtriune_jax.data import digits
from vtriune_jax.data.packing import stack_vision
from vtriune_jax.data.prompts import Prompter
from vtriune_jax.data.rows import Slots
from vtriune_jax.data.sources import HUB_NAME, Source, load
from vtriune_jax.data.tokenizer import load_processor
from vtriune_jax.errors import UserError
from vtriune_jax.failures import Failures
from vtriune_jax.models import lora
from vtriune_jax.models.config import ModelConfig
from vtriune_jax.rollout.local import LocalEngine
from vtriune_jax.served import ServedEngine, serve
from vtriune_jax.stages import check_rows
from vtriune_jax.tiny import ensure_tiny
from vtriune_jax.types import Prompt, Sample
from vtriune_jax.verifiers import known_verifiers
from vtriune_jax.verifiers.checking import Check, checking
from vtriune_jax.verifiers.client import VerifierClient
from vtriune_jax.verifiers.embedded import VerifierServer
from vtriune_jax.verifiers.in_process import InProcess
from vtriune_jax.verifiers.request import check_health


@dataclass(frozen=True)
class Parts:
    """What `train.run` works with; nothing here changes during a run but the verifiers' state, and
    what was told of faults."""

    config: Any
    mesh: Mesh
    model_config: ModelConfig
    checkpoint_path: Path
    """The checkpoint folder the run started from."""
    graphdef: nnx.GraphDef
    params: Any
    """The parameters of that checkpoint, on the mesh, until the first stage takes them."""
    prompter: Prompter
    slots: Slots
    train: tuple[tuple[Source, float], ...]
    heldout: tuple[Sample, ...]
    sources: tuple[str, ...]
    """All data source names, sorted: the order of per-source sums."""
    engine: LocalEngine | ServedEngine
    verifiers: VerifierClient | InProcess
    failures: Failures = field(default_factory=Failures)
    told_of: set[str] = field(default_factory=set)
    """Sources of whose bad rows, passed over in training, the run has told."""

    @property
    def served(self) -> ServedEngine | None:
        """The engine if it is a fleet of servers, with their own copies of the weights."""
        return self.engine if isinstance(self.engine, ServedEngine) else None

    @property
    def source_index(self) -> dict[str, int]:
        """Place of each data source in per-source sums."""
        return {name: i for i, name in enumerate(self.sources)}

    def place(self, params: Any) -> Any:
        """The parameters on the mesh."""
        return jax.device_put(params, sharding.shardings(params, self.mesh))

    def encode(
        self, params: Any, prompts: Sequence[Prompt]
    ) -> Float[jax.Array, "prompts units embed"]:
        """The features of the prompts' images, each device with its rows.

        They go through the tower in pieces, at most as many as the rows of an update. Of several
        processes each gives its own prompts; the features are those of all.
        """
        vision = sharding.shard_rows(stack_vision(prompts, self.slots), self.mesh)
        pieces = sharding.even_pieces(
            len(vision.segments), self.mesh, self.config.batch.micro_batches
        )
        with jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh):  # for the tower's `on_rows`
            return models.encode(self.graphdef, params, vision, pieces)


@contextlib.contextmanager
def assemble(config: Any, workdir: Path) -> Iterator[Parts]:
    """Build everything; on exit, stop what was started (the verifier server).

    Raises:
      UserError: whatever is wrong with the config, the checkpoint or the data.
    """
    mesh = sharding.make_mesh(**config.mesh)
    _check_hosts(config, mesh)
    check_rows(config, mesh)
    with hosts.together(), _checks(config) as checks:
        judged = checks if "grpo" in config.stages else None
        train = tuple(
            (_load(config, name, "train", judged), float(w)) for name, w in config.data.train
        )
        heldout = _heldout(config, checks)
    hosts.check_same("data", _fingerprint(train, heldout))
    path = _checkpoint_path(config, workdir)
    adapters = lora.from_keys(config.model.lora)
    model = models.load_pretrained(
        path,
        dtype=config.model.dtype,
        remat=config.model.remat,
        unroll=config.model.unroll,
        attention=config.model.attention,
        param_dtype=config.model.lora.base_dtype if adapters else "float32",
        lora=adapters,
        seed=config.seed,
        shardings=lambda name, shape: NamedSharding(mesh, sharding.spec(name, shape, mesh)),
    )
    graphdef, params = models.split(model)
    prompter = Prompter(
        load_processor(path),
        model.config,
        min_pixels=config.data.min_pixels,
        max_pixels=config.data.max_pixels,
        cot=config.data.cot_prompts,
        seed=config.seed,
    )
    names = {name for source, _ in train for name in source.data_sources}
    names |= {sample.data_source for sample in heldout}
    slots = Slots(
        prompt_tokens=config.batch.prompt_tokens,
        completion_tokens=config.batch.completion_tokens,
        windows=config.batch.windows,
        pad_id=prompter.pad_id,
    )
    with contextlib.ExitStack() as stack:
        engine = LocalEngine(
            graphdef,
            stop_ids=prompter.stop_ids,
            banned_ids=prompter.banned_ids,
            pad_id=prompter.pad_id,
            decode_text=prompter.decode,
            mesh=mesh,
            pieces=config.rollout.pieces,
        )
        if config.rollout.engine == "sglang":
            served = serve(
                config,
                workdir,
                checkpoint=path,
                model_config=model.config,
                graphdef=graphdef,
                mesh=mesh,
                prompter=prompter,
                slots=slots,
                examples=heldout or [train[0][0][0]],
            )
            engine = stack.enter_context(served)
        yield Parts(
            config=config,
            mesh=mesh,
            model_config=model.config,
            checkpoint_path=path,
            graphdef=graphdef,
            params=params,
            prompter=prompter,
            slots=slots,
            train=train,
            heldout=heldout,
            sources=tuple(sorted(names)),
            engine=engine,
            verifiers=stack.enter_context(_verifiers(config)),
        )


def _check_hosts(config: Any, mesh: Mesh) -> None:
    """What a run over several processes asks of the config."""
    processes, keys = jax.process_count(), config.rollout
    if processes == 1:
        return
    sharding.check_hosts(mesh)
    if keys.engine == "sglang" and keys.ahead and config.grpo.refill:
        raise UserError(
            f"rollout.ahead={keys.ahead} with grpo.refill={config.grpo.refill} is not possible "
            f"with a fleet over {processes} processes, which would have to agree on each refill "
            "while they train; choose 0 for one of the two, or one process"
        )


@contextlib.contextmanager
def _checks(config: Any) -> Iterator[Check | None]:
    """What checks the rows for their verifiers; None where those are on a server of others, which
    may have other ones."""
    if config.verifiers.addresses:
        yield None
    else:
        with checking() as check:
            yield check


def _load(config: Any, name: str, split: Any, check: Check | None) -> Source:
    source = load(
        name,
        split,
        cache=Path(config.data.cache).expanduser(),
        on_bad_row=config.data.on_bad_row,
        known_verifiers=known_verifiers(),
        check=check,
    )
    if source.skipped and hosts.is_first():
        print(f"{name}: {source.skipped} bad rows skipped, the first: {source.first_fault}")
    return source


def _heldout(config: Any, check: Check | None) -> tuple[Sample, ...]:
    sources = [_load(config, name, "heldout", check) for name in config.data.heldout]
    return tuple(sample for source in sources for sample in source[: config.eval.rows_per_source])


def _checkpoint_path(config: Any, workdir: Path) -> Path:
    if config.model.path:
        path = Path(config.model.path).expanduser()
        _check_model(path)
        return path
    path = workdir / "model"
    hosts.from_first(lambda: str(ensure_tiny(path, config.model.tiny, digits.texts(), config.seed)))
    return path


def _check_model(path: Path) -> None:
    """UserError, with what was meant perhaps, for what cannot be a checkpoint folder."""
    if not path.is_dir():
        hint = "give the folder of a Qwen2.5-VL checkpoint"
        if HUB_NAME.fullmatch(str(path)):
            folder = Path("models") / path.name
            hint = (
                f"names on the hub are not fetched, download it first: hf download {path} "
                f"--local-dir {folder}, then model.path={folder}"
            )
        raise UserError(f"model.path={path} is no folder; {hint}")
    if (path / "checkpoints").is_dir():  # of a run
        hint = f"export one: python -m vtriune_jax.export --checkpoint={path} --out=FOLDER"
        if (path / "final" / "config.json").is_file():
            hint = f"did you mean {path / 'final'}?"
        raise UserError(f"model.path={path} is the workdir of a run, not a model; {hint}")


def _fingerprint(
    train: Sequence[tuple[Source, float]], heldout: Sequence[Sample]
) -> dict[str, object]:
    """What must be equal where several processes read the same data: sizes, and some rows."""
    found: dict[str, object] = {"held-out rows": [sample.id for sample in heldout]}
    for source, _ in train:
        ends = zlib.crc32(repr((source[0], source[-1])).encode())
        found[source.name] = {"rows": len(source), "skipped": source.skipped, "ends": ends}
    return found


@contextlib.contextmanager
def _verifiers(config: Any) -> Iterator[VerifierClient | InProcess]:
    """The verifiers of the config: in this process, at given addresses, or a server of our own."""
    limit = config.verifiers.timeout_seconds
    with contextlib.ExitStack() as stack:
        if config.verifiers.mode == "in_process":
            yield stack.enter_context(InProcess(config.verifiers.workers, limit))
            return
        addresses: Any = tuple(config.verifiers.addresses)
        if not addresses:
            server = stack.enter_context(
                VerifierServer(workers=config.verifiers.workers, limit=limit)
            )
            addresses = server.addresses
        else:
            check_health(addresses)
        deadline = config.verifiers.deadline_seconds
        yield stack.enter_context(VerifierClient(addresses, deadline=deadline))
