"""The metrics that RIPT's runs record, and how their report shows them.

To add a metric, add it here and to docs/metrics.md; a test compares the two.
"""

from pi0.report.declaration import SUCCESS, Curve, Declaration, Metric, Plot
from pi0.training import memory

PLOTS = (
    Plot("learning_curve", "Learning curve", "all tasks, evaluation on states never trained on"),
    Plot("training", "Loss, gradient norm and learning rate"),
    Plot("advantages", "Advantages"),
    Plot("groups", "Groups of rollouts"),
    Plot("phases", "Where the time goes"),
    Plot("memory", "Memory"),
)
COLLECTED = (
    Metric("tasks", "[successes, rollouts]",
           "practice by task, dropped groups included, on training states with the acting policy's exploration",
           merge="by task", curves=(Curve("learning_curve", SUCCESS, "practice", "success"),), column="solved",
           tile="Practice", flat=("successes/*", "rollouts/*"), rate="success_rate"),
    Metric("rollouts", "rollouts", "rollouts of all tasks, dropped groups included", merge="sum"),
    Metric("successes", "rollouts",
           "rollouts that succeeded; `success_rate` in WandB and TensorBoard is their share of `rollouts`",
           merge="sum"),
    Metric("states", "states", "initial states of these rollouts, a state counted once on each rank", merge="sum"),
    Metric("trajectories", "rollouts",
           "rollouts of the groups that were kept: the policy learns from these", merge="sum"),
    Metric("solved", "rollouts", "successes among `trajectories`", merge="sum"),
    Metric("groups", "groups", "collected groups, whose rollouts share a baseline", merge="sum", column="groups",
           curves=(Curve("groups", "groups a step", "learned from", "area", less="unanimous_groups", color="green"),)),
    Metric("unanimous_groups", "groups",
           "collected groups that teach nothing, since all their rollouts scored the same",
           merge="sum", column="unanimous",
           curves=(Curve("groups", "groups a step", "kept, all rollouts agree", "area", color="grey"),)),
    Metric("dropped_groups", "groups", "unanimous groups that dynamic sampling replaced by others",
           merge="sum", column="dropped",
           curves=(Curve("groups", "groups a step", "dropped, all rollouts agree", "area", color="red"),),
           note="Practice counts all rollouts, also those of {} that dynamic sampling dropped because all agreed."),
    Metric("dropped_share", "0 to 1", "`dropped_groups` as a share of the groups that ran whole"),
    Metric("dropped_by_task", "[all succeeded, none did]", "`dropped_groups` by task", merge="by task",
           flat=("dropped_by_task/*/solved", "dropped_by_task/*/failed")),
    Metric("skipped_states", "states", "states skipped because they were solved on each of their last visits",
           merge="sum", column="skipped states",
           curves=(Curve("groups", "skipped", "initial states skipped as solved", "area", color="purple"),)),
    Metric("skipped_by_task", "[states]", "`skipped_states` by task (from stage 12 on)", merge="by task",
           flat=("skipped_by_task/*",)),
    Metric("skipped_share", "0 to 1", "`skipped_states` as a share of the states whose turn it was"),
    Metric("lost_workers", "lines",
           "workers that died, hung or answered garbage, with cause and rollouts (which ran again)",
           merge="sum", trouble=("", "no worker was lost")),
    Metric("failed_rollouts", "lines", "rollouts whose simulation broke, with cause; their groups were replaced",
           merge="sum", column="failed rollouts",
           trouble=("failed, its group is left out: ", "no rollout failed")),
    Metric("control_steps", "control steps", "control steps of all rollouts (20 a second of robot time)", merge="sum",
           column="control steps"),
    Metric("rollout_seconds", "s", "wall time of the collection", merge="max"),
    Metric("advantages", "success rate",
           "leave-one-out advantages, -1 to 1: `count`, `mean`, `std`, `min`, `max`, and the share `positive`",
           merge="distribution",
           curves=(Curve("advantages", "advantage", style="band"),
                   Curve("advantages", "above zero (%)", part="positive", scale=100, color="green", span=(0, 104)))),
)  # fmt: skip
LEARNED = (
    Metric("updates", "optimizer steps",
           "optimizer steps in this iteration; absent, as are `loss` and `grad_norm`, when there was nothing to "
           "learn from",
           column="updates"),
    Metric("loss", "squared velocity",
           "mean over the step's minibatches of sum(weight x flow loss) / sum(abs(weight)); actions are normalised, "
           "so velocities have no unit; absent when no gradient was finite",
           curves=(Curve("training", "loss"),), column="loss", format=".4f"),
    Metric("grad_norm", "loss by weight",
           "mean norm of the gradient before clipping; absent when no gradient was finite",
           curves=(Curve("training", "gradient norm",
                         limit=("algo.grad_norm_clip", "the gradient norm is clipped to this")),),
           column="gradient norm", format=".3f"),
    Metric("clipped_share", "0 to 1",
           "share of the flow's steps that teach nothing because their ratio is beyond `algo.ratio_clip` (mode ratio)",
           curves=(Curve("training", "clipped share"),), format=".3f"),
    Metric("ratio_kl", "nats",
           "mean over the flow's steps of ratio - 1 - log(ratio), an estimate of the divergence from the policy that "
           "acted (mode ratio)"),
    Metric("lr", "Adam steps", "learning rate of the step: how far a weight moves where its gradient is steady",
           curves=(Curve("training", "learning rate"),), column="learning rate", format=".2e"),
    Metric("bad_updates", "optimizer steps",
           "optimizer steps left out because their gradient was not finite (stage 13)"),
    Metric("rollbacks", "times",
           "how often the run has returned to its last good checkpoint, each time after `training.max_bad_updates` bad "
           "updates in a row; those are in no line (stage 13)"),
    Metric("passes", "passes",
           "passes in which a minibatch is computed, doubled each time that memory has run out; 1: at once (stage 13)"),
)  # fmt: skip
# Parts of a step's wall time, from the bottom of the plot up.
PHASES = tuple(
    Metric(f"phases/{name}", "s", meaning, merge, (Curve("phases", "seconds a step", name, "area"),))
    for name, meaning, merge in (
        (
            "render",
            "workers drew frames while the trainer waited, on average over workers",
            "rollout_seconds",
        ),
        ("inference", "the policy acted", "rollout_seconds"),
        ("physics", "workers simulated while the trainer waited, on average over workers", "rollout_seconds"),
        ("update", "the policy learned", "first"),
        ("wait", "the trainer waited, and workers had nothing to do", "rollout_seconds"),
        ("other", "what lies between these; logging, saving and evaluation come after the step", "first"),
    )
)
METRICS = Declaration(
    PLOTS,
    (
        Metric("step", "iteration", "number of the iteration, from 0", column="step"),
        Metric("seconds", "s", "wall time since the start, when the step's rollouts were done",
               column="time", format="duration"),
        *COLLECTED,
        *LEARNED,
        *PHASES,
        *memory.METRICS,
    ),
)  # fmt: skip
