"""One of several processes that publish a model together: processes, process, port, folders."""

import json
import sys
from pathlib import Path

import jax
from jax.sharding import NamedSharding

from vtriune_jax import models, sharding
from vtriune_jax.errors import UserError
from vtriune_jax.models import files
from vtriune_jax.rollout.publish import Publisher


def main(processes: int, process: int, port: int, checkpoint: Path, folder: Path) -> None:
    if processes > 1:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(f"127.0.0.1:{port}", processes, process)
    mesh = sharding.make_mesh(fsdp=2, tensor=-1)
    model = models.load_pretrained(
        checkpoint,
        shardings=lambda path, shape: NamedSharding(mesh, sharding.spec(path, shape, mesh)),
    )
    opened, make = [], files.Writer.__init__

    def note(self, file, shapes, dtype):
        opened.append(file.name)
        make(self, file, shapes, dtype)

    files.Writer.__init__ = note
    publisher = Publisher(
        folder,
        model.config,
        reference=checkpoint,
        frozen=("^visual/",),
        dtype="float32",
        keep=1,
        max_shard_bytes=20_000,
    )
    said = []
    for version in (1, 2):
        published = publisher.publish(models.split(model)[1], version)
        said.append({"written": sorted(opened), "bytes": published.bytes})
        opened.clear()
    last = process == processes - 1
    publisher.collect({1} if last else {2})  # each host knows its own servers
    said.append({"versions": sorted(path.name for path in folder.glob("version-*"))})
    if last:  # the disk of one host is full

        def full(*_):
            raise OSError(28, "No space left on device")

        setattr(files.Writer, "add", full)  # noqa: B010
    try:
        publisher.publish(models.split(model)[1], 3)
    except UserError as error:
        said.append({"error": str(error)})
    said.append({"left": sorted(path.name for path in folder.glob(".*"))})
    print(json.dumps(said))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]), Path(sys.argv[5]))
