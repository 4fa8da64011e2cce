"""The same for whole batches; it reports how many it was given."""

from tests.verifiers import rogue


def verify(completion, ground_truth, params, progress):
    return rogue.verify(completion, ground_truth, params, progress) | {"together": 1}


def verify_batch(tasks):
    if any(task[0] == "lose one" for task in tasks):
        tasks = tasks[1:]
    return [rogue.verify(*task) | {"together": len(tasks)} for task in tasks]
