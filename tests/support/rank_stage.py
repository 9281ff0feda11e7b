"""Run under torchrun by test_distributed.py: a stage's own run, and what each rank has seen of it.

Usage: rank_stage.py FOLDER SCRIPT ARGUMENTS-OF-THE-SCRIPT...

Each rank writes FOLDER/rank0.json ...: after each update a digest of its weights, the loss of each minibatch, whether
gradients met in its backward pass, and the loss that was reported; the seed of its noise; which of the files of results
it wrote; whether it has left the others in the end.
"""

import hashlib
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import torch.distributed as dist

from pi0.base.paths import REPO_ROOT


def main() -> None:
    folder, script = Path(sys.argv[1]), REPO_ROOT / sys.argv[2]
    spec = importlib.util.spec_from_file_location("stage", script)
    stage = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(stage)
    seen = {"updates": [], "wrote": []}
    watch_updates(stage, seen)
    for name in ("write_report", "film_before_after"):
        watch_writing(stage, name, seen)
    join = stage.setup_distributed

    def joined() -> tuple[int, int, int]:
        seen["rank"], *others = join()
        return seen["rank"], *others

    stage.setup_distributed = joined
    sys.argv = [str(script), *sys.argv[3:]]
    stage.main()
    seen["has left"] = not dist.is_initialized()
    (folder / f"rank{seen['rank']}.json").write_text(json.dumps(seen))


def watch_updates(stage: ModuleType, seen: dict) -> None:
    update = stage.update_policy

    def watched(config, learner, batch):
        adapter = learner.adapter
        losses, met, minibatch_loss = [], [], adapter.minibatch_loss

        def watched_loss(minibatch, generator):
            met.append(adapter.model.require_backward_grad_sync)
            loss = minibatch_loss(minibatch, generator)
            losses.append(loss.item())
            return loss

        adapter.minibatch_loss = watched_loss
        metrics = update(config, learner, batch)
        adapter.minibatch_loss = minibatch_loss
        weights = hashlib.sha256()
        for tensor in [*learner.policy.state_dict().values(), *learner.average.module.state_dict().values()]:
            weights.update(tensor.numpy().tobytes())
        seen["seed"] = learner.generator.initial_seed()
        seen["updates"].append(
            {"weights": weights.hexdigest(), "losses": losses, "met": met, "reported": metrics}
        )
        return metrics

    stage.update_policy = watched


def watch_writing(stage: ModuleType, name: str, seen: dict) -> None:
    write = getattr(stage, name)

    def watched(*arguments):
        seen["wrote"].append(name)
        return write(*arguments)

    setattr(stage, name, watched)


if __name__ == "__main__":
    main()
