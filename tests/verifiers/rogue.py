"""A verifier that does what the completion says, for the tests of what happens then."""

import os
import signal
import time
from pathlib import Path


def verify(completion, ground_truth, params, progress):
    match completion.split():
        case ["sleep", seconds]:
            time.sleep(float(seconds))
        case ["die"]:
            os.kill(os.getpid(), signal.SIGKILL)
        case ["die", "once", path]:
            if not Path(path).exists():
                Path(path).touch()
                os.kill(os.getpid(), signal.SIGKILL)
        case ["raise"]:
            raise ValueError("as told,\n  in two lines")
        case ["grow", megabytes]:
            assert len(bytearray(int(megabytes) * 2**20))
        case ["keep", megabytes]:
            params["kept"] = _kept.append(bytearray(os.urandom(2**20)) * int(megabytes))
        case ["pid"]:
            return {"accuracy": 1.0, "format": 0.0, "pid": os.getpid()}
        case ["nothing"]:
            return None
    return {"accuracy": 1.0, "format": 0.0}


_kept = []
