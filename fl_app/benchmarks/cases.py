"""The cases of every benchmark of attacks: `flowleak bench NAME`.

The first case of a client (at equal iterations) is what its others are compared
with, draw by draw. Times are of one thread of a shared 2-core machine.
"""

from __future__ import annotations

from dataclasses import replace

from client_app.training import NO_DEFENSE
from fl_app.benchmarks.case import Case
from fl_app.config import UNBOUNDED, AttackConfig
from fl_app.protocol import Defense, LocalTraining
from server_strategies.attacks.flow_matching import PRIOR_STRENGTH

Options = dict[str, float | str]

_ADAM = LocalTraining(optimizer="adam", lr=1e-3, local_steps=5)
_SGD = LocalTraining(optimizer="sgd", lr=0.01, local_steps=5)


def _flow(iterations: int, **options: float | str) -> AttackConfig:
    return AttackConfig("flow_matching", iterations, options=options)


def _quick() -> tuple[Case, ...]:
    """Return the cases of `quick`: both clients, and what explaining by a surrogate loses."""
    sgd = replace(_SGD, batch_size=4)
    return (
        Case(replace(_ADAM, batch_size=1), _flow(200), bar=21.5),
        Case(replace(_ADAM, batch_size=4), _flow(200), bar=21.0),
        Case(sgd, _flow(200), bar=22.0),
        Case(sgd, _flow(200, matching="surrogate")),
        Case(sgd, AttackConfig("sme", 300, options={"tv": 0.03}), bar=21.0),
    )


def _explained() -> tuple[Case, ...]:
    """Return the cases of `matching_objective`: its bars, then every way to explain."""
    long = replace(_ADAM, local_steps=20, batch_size=4)
    cases = [
        Case(replace(_ADAM, local_steps=1, batch_size=4), _flow(150), bar=28.0),
        Case(replace(_ADAM, batch_size=1), _flow(200), bar=24.0),
        Case(replace(_ADAM, batch_size=4), _flow(300)),
        Case(replace(_ADAM, batch_size=4), _flow(200), labels_known=False),
        Case(replace(_ADAM, batch_size=8), _flow(500), bar=22.0),
        Case(replace(long, reshuffle=False), _flow(300), bar=24.0, num_examples=20),
        Case(long, _flow(300), bar=21.0, num_examples=20),
        Case(replace(_SGD, momentum=0.9, batch_size=4), _flow(300), bar=23.0),
    ]
    for client, at_once in ((_SGD, "gradient"), (_ADAM, "inversion")):
        for steps in (1, 5, 20):
            kinds = ["surrogate", "trajectory"]
            if steps == 1:
                kinds += [at_once, "sign"]
            elif client is _ADAM:
                kinds += ["fingerprints"]
            one_image = replace(client, local_steps=steps, batch_size=1, reshuffle=False)
            cases += [
                Case(one_image, _flow(60, matching=kind), num_examples=min(steps, 5))
                for kind in kinds
            ]
    return tuple(cases)


def _ablation() -> tuple[Case, ...]:
    """Return the cases of `ablation`: how the flow prior is best used.

    One change at a time to the defaults, which come first: 14 cases of each
    client at B=1, 5 at B=4, and with and without the flow at B=8. With 16 draws, 4
    hours of one thread; ``--cases B=4,`` runs a part.
    """
    # As eq. 17 and 18 have it: absolute weights, here at a constant flow time.
    literal: Options = {"mode": "velocity", "prior_strength": 0, "t_start": 0.95, "t_end": 0.95}
    of_eight: list[Options] = [{}, {"flow": 0}]
    of_four = [*of_eight, {"every": 4}, {**literal, "flow": 0.01}, {"polish": 0.25}]
    of_one = [
        *of_four,
        {**literal, "flow": 0.001},
        {"every": 2},
        {"tv": 0},
        {"prior_strength": 0.4, "final_prior_strength": 0.1},
        {"draws": 2},
        {"t_start": 0.8, "t_end": 0.8},
        {"t_start": 0.95, "t_end": 0.95},
    ]
    cases = []
    for size, iterations, tried in ((1, 100, of_one), (4, 100, of_four), (8, 200, of_eight)):
        # An absolute weight has to fit the client's loss; chosen by hand on one draw of each.
        # Each client also gets the prior_strength that is the other's default.
        for client, flow, (first, last) in (
            (_SGD, 0.3, PRIOR_STRENGTH["adam"]),
            (_ADAM, 1.0, PRIOR_STRENGTH["sgd"]),
        ):
            absolute: Options = {"prior_strength": 0, "flow": flow}
            swapped: Options = {"prior_strength": first, "final_prior_strength": last}
            also = [absolute, swapped] if size == 1 else []
            cases += [
                Case(replace(client, batch_size=size), _flow(iterations, **options))
                for options in (*tried, *also)
            ]
    return tuple(cases)


_PAIR = (replace(_SGD, batch_size=4), replace(_ADAM, batch_size=4))


def _tv_weights() -> tuple[Case, ...]:
    """Return the cases of `tv-weights`: the grids that `prior` takes its weights from.

    On draws that `prior` does not use: ``--seed 1000 --draws 4``, about 70
    minutes of one thread. Where total variation pulls alone, balanced, its own
    weight does not matter.
    """
    alone: list[Options] = [
        {"flow": 0, "prior_strength": 0, "tv": 0.01},
        {"flow": 0, "prior_strength": 0, "tv": 0.03},
        {"flow": 0, "prior_strength": 0, "tv": 0.1},
        {"flow": 0, "prior_strength": 0, "tv": 0.3},
        {"flow": 0, "prior_strength": 0.4, "final_prior_strength": 0.1},
        {"flow": 0, "prior_strength": 0.1, "final_prior_strength": 0.05},
        {"flow": 0, "prior_strength": 1.5, "final_prior_strength": 0.2},
    ]
    beside_flow: list[Options] = [{"tv": tv} for tv in (0.01, 0.03, 0.1)]
    return tuple(
        Case(client, _flow(200, **options))
        for client in _PAIR
        for options in (*alone, *beside_flow)
    )


def _prior_strength() -> tuple[Case, ...]:
    """Return the cases of `prior-strength`: how strongly priors pull.

    With SGD K=5, B=4 with the flow prior and with total variation alone, then other
    clients; with Adam both by their pull at the end, as `prior` runs them. What
    `PRIOR_STRENGTH` rests on: ``--seed 1000 --draws 4``, 80 minutes of one thread.
    """
    batch = Case(_PAIR[0], _flow(200))
    one = replace(batch, training=replace(_SGD, batch_size=1), rounds=2)
    tried: list[tuple[Case, Options]] = [
        (batch, {}),
        (batch, {"flow": 0}),
        (replace(batch, training=replace(_SGD, local_steps=1, batch_size=16)), {}),
        (one, {}),
        (replace(one, model="mlp_mixer"), {}),
    ]
    of_sgd = (
        replace(case, attack=_flow(200, prior_strength=first, final_prior_strength=0.05, **options))
        for case, options in tried
        for first in (0.1, 0.4, 1.5)
    )
    of_adam = (
        Case(_PAIR[1], _flow(500, prior_strength=1.5, final_prior_strength=last, **options))
        for options in ({}, {"flow": 0})
        for last in (0.2, 0.45, 0.7)
    )
    return (*of_sgd, *of_adam)


def _gates() -> tuple[Case, ...]:
    """Return the cases of `gates`: how wide the slope of ReLU's gates is best, on the ConvNet.

    What `RELU_SMOOTHING` was chosen by: ``--seed 1000 --draws 2``, 20 minutes of one
    thread. First without, with the best prior_strength of then.
    """
    sgd, adam = _PAIR
    before: Options = {"relu_smoothing": 0, "prior_strength": 0.4, "final_prior_strength": 0.3}
    cases = [Case(sgd, _flow(200, **before))]
    widths = {sgd: (0, 1, 8, 16, 32), adam: (0, 1), replace(adam, local_steps=1): (0, 16)}
    cases += [
        Case(client, _flow(200, relu_smoothing=width))
        for client, tried in widths.items()
        for width in tried
    ]
    return tuple(cases)


def _distances() -> tuple[Case, ...]:
    """Return the cases of `distances`: SGD's moves matched with their length or without.

    What ``distance=auto`` rests on: ``--seed 1000 --draws 2``, 12 minutes of one
    thread for the ConvNet, 25 for the MLP-Mixer. The default comes first.
    """
    one = Case(replace(_SGD, batch_size=1), _flow(100))
    clients = (
        one,
        replace(one, rounds=2),
        replace(one, training=_PAIR[0]),
        replace(one, training=replace(one.training, momentum=0.9)),
        replace(one, training=replace(_PAIR[0], local_steps=1)),
    )
    cosine = _flow(100, distance="cosine")
    cases = [each for case in clients for each in (case, replace(case, attack=cosine))]
    mixer = replace(one, rounds=2, model="mlp_mixer")
    two_steps = replace(one.training, local_steps=2)
    for case, iterations in ((replace(mixer, training=two_steps), 300), (mixer, 500)):
        cases += [
            replace(case, attack=_flow(iterations)),
            replace(case, attack=_flow(iterations, distance="even")),
        ]
    return tuple(cases)


def _rates() -> tuple[Case, ...]:
    """Return the cases of `rates`: the search's learning rate, the default first.

    ``--seed 1000 --draws 4``, 70 minutes of one thread, half of them the MLP-Mixer's.
    """
    sgd, adam = _PAIR
    one = Case(replace(sgd, batch_size=1), _flow(200), rounds=2)
    return tuple(
        replace(case, attack=_flow(200, **options))
        for case, rates in (
            (Case(sgd, _flow(200)), (2.0, 4.0)),
            (one, (2.0, 4.0)),
            (replace(one, model="mlp_mixer"), (2.0, 4.0)),
            (Case(adam, _flow(200)), (0.4, 2.0)),
        )
        for options in ({}, *({"lr": rate} for rate in rates))
    )


def _prior() -> tuple[Case, ...]:
    """Return the cases of `prior`: what the flow prior gains over the best total variation.

    The defaults, with and without the flow: of the weights and prior-strength that were
    tried on draws from 1000 on the best of either (`prior-strength`). With 16 draws, 1.5
    hours of one thread.
    """
    cases = []
    for client, gain in zip(_PAIR, (1.5, 2.5), strict=True):
        cases += [Case(client, _flow(500, flow=0)), Case(client, _flow(500), gain=gain)]
    return tuple(cases)


def _models() -> tuple[Case, ...]:
    """Return the cases of `models`: every architecture, after two rounds of training.

    Not of the MLP, whose first layer gives an image away in closed form. SGD's
    are matched without the slope of ReLU's gates, too, and models with BatchNorm
    attacked in both its modes. 500 iterations take one thread 40 seconds a draw of
    the ConvNet, 1 to 3 minutes of ResNet-8 and the Mixer, 10 to 50 of the larger ones.
    """
    cases = []
    for model in ("convnet", "mlp_mixer", "resnet8", "resnet18", "vgg11", "vit_tiny"):
        bar = 8.0 if model in ("convnet", "mlp_mixer") else 3.0
        sgd, adam = (
            Case(replace(client, batch_size=1), _flow(500), model=model, rounds=2)
            for client in (_SGD, _ADAM)
        )
        attacked = [replace(sgd, above_mean_colour=bar)]
        if model in ("resnet8", "resnet18", "vgg11"):
            frozen = replace(sgd.training, batch_norm="eval")
            attacked.append(replace(attacked[0], training=frozen))
        for case in attacked:
            cases.append(case)
            if model not in ("mlp_mixer", "vit_tiny"):  # their units have no gates
                cases.append(replace(case, attack=_flow(500, relu_smoothing=0)))
        cases.append(adam)
    return tuple(cases)


def _closed_form() -> tuple[Case, ...]:
    """Return the cases of `closed-form`: one image and one step, of models that give it away.

    With 8 draws, 6 minutes of one thread.
    """
    return tuple(
        Case(replace(client, local_steps=1, batch_size=1), _flow(50), model=model)
        for model in ("mlp", "vit_tiny")
        for client in (_SGD, _ADAM)
    )


def _batch_sizes() -> tuple[Case, ...]:
    """Return the cases of `batch-sizes`: Figure 3 of the paper, for one local step and for five.

    With 8 draws, about 7 hours of one thread, half of them at B=32;
    ``--cases B=4`` runs a part.
    """
    return tuple(
        Case(replace(client, local_steps=steps, batch_size=size), _flow(300))
        for client in (_SGD, _ADAM)
        for steps in (1, 5)
        for size in (1, 2, 4, 8, 16, 32)
    )


def _tiny_imagenet() -> tuple[Case, ...]:
    """Return the cases of `tiny-imagenet`: 64x64 images, seen by the prior whole or in tiles.

    Take ``--dataset tiny_imagenet``, or a folder of it.
    """
    return tuple(
        Case(client, _flow(500, **options), rounds=2, above_mean_colour=bar)
        for client, bar in (
            (replace(_SGD, batch_size=1), 5.0),
            (replace(_ADAM, batch_size=1), None),
        )
        for options in ({}, {"tiles": True})
    )


def _for(seconds: float, name: str, **options: float | str) -> AttackConfig:
    return AttackConfig(name, UNBOUNDED, seconds, options)


# For 50 seconds of one thread; chosen on draw 1000, see `_family_constants`.
_IN_SHORT: dict[str, Options] = {
    "flow_matching": {"every": 4},
    "sme": {"tv": 0.03},
    "inverting_gradients": {"matching": "auto", "lr": 0.3, "tv": 0.05},
    "dlf": {"distance": "squared"},
    "gradinversion": {"matching": "auto", "lr": 0.8, "tv": 0.05, "seeds": 2},
}


def _family_constants() -> tuple[Case, ...]:
    """Return the cases of `family-constants`: the authors' constants beside those of `family`.

    And GGL's two searches. On draws that `family` does not use: ``--seed 1000
    --draws 2``, about 27 minutes of one thread.
    """
    client = replace(_SGD, batch_size=4)
    tried: dict[str, list[Options]] = {
        "flow_matching": [{}],
        "sme": [{}, {"tv": 0.1}],
        "inverting_gradients": [{}, {"matching": "auto"}],
        "dlf": [{}, {"lr": 0.15}],
        "gradinversion": [{}, {"matching": "auto"}],
    }
    single = replace(_SGD, local_steps=1, batch_size=1)
    return (
        *(
            Case(client, _for(50, name, **options))
            for name, others in tried.items()
            for options in (*others, _IN_SHORT[name])
        ),
        Case(single, _for(50, "ggl")),
        Case(single, _for(50, "ggl", search="cma")),
    )


def _family() -> tuple[Case, ...]:
    """Return the cases of `family`: every attack at equal seconds, with the bars of each.

    What its paper says it can, on a client with SGD; then, on clients with Adam,
    the authors' own objective beside ``matching=auto``. 50 seconds hold fewer
    iterations than the authors' constants are for: where others bring more in
    that time they stand in the case's name, chosen on draw 1000 (docs/attacks.md).
    With 8 draws about 48 minutes of one thread. On cores that others share,
    seconds are not equal.
    """
    batch, single = replace(_SGD, batch_size=4), replace(_SGD, local_steps=1, batch_size=1)
    cases = [
        Case(batch, _for(50, "flow_matching", **_IN_SHORT["flow_matching"]), first=True),
        Case(batch, _for(50, "sme", **_IN_SHORT["sme"]), bar=20.0),
        Case(batch, _for(50, "inverting_gradients", **_IN_SHORT["inverting_gradients"]), bar=20.0),
        Case(batch, _for(50, "dlf", **_IN_SHORT["dlf"]), bar=20.0),
        Case(batch, _for(50, "gradinversion", **_IN_SHORT["gradinversion"]), bar=16.0),
        Case(single, _for(5, "dlg"), above_mean_colour=0.0),
        Case(single, _for(5, "ggl"), above_mean_colour=0.0),
    ]
    adam = replace(_ADAM, batch_size=1)
    cases.append(Case(adam, _for(12, "flow_matching"), first=True))
    for client, seconds, names in (
        (adam, 12, ("sme", "inverting_gradients", "dlf")),
        (replace(adam, local_steps=1), 5, ("dlg", "ggl")),
    ):
        for name in names:
            cases += [
                Case(client, _for(seconds, name)),
                Case(client, _for(seconds, name, matching="auto"), above_mean_colour=3.0),
            ]
    return tuple(cases)


# The paper's defences (section 4). Its sigma is lost; it is taken in units of the update, for
# the federation that tells the cost makes larger updates than the client that is attacked.
_PAPERS_DEFENSES = (
    Defense(noise="gaussian", sigma=1.0, relative=True),
    Defense(clip=0.05),
    Defense(sparsify=0.05),
    Defense(precode=256),
)
# Of noise that costs the federation with Adam less than two points, the most.
_FREE_NOISE = Defense(noise="gaussian", sigma=10.0, relative=True)
# With these, one curve each: that of gaussian noise is the paper's table 1.
_CURVES = (
    *(Defense(noise="gaussian", sigma=s, relative=True) for s in (3.0, 30.0, 100.0)),
    *(Defense(sparsify=share) for share in (0.9, 0.99)),
    *(Defense(clip=bound) for bound in (0.002, 0.0005)),
    *(Defense(dp_clip=1.0, dp_noise=noise) for noise in (0.1, 1.0)),
    *(Defense(quantize=kind) for kind in ("bf16", "int8")),
    Defense(noise="laplace", sigma=3.0, relative=True),
    Defense(clip=0.1, clip_by="norm", local_dp=100.0),
    Defense(soteria=0.1),
)
# A quarter of a minute of one thread each.
_IN_TABLE_4: dict[str, int] = {
    "flow_matching": 70,
    "sme": 190,
    "dlf": 90,
    "ggl": 90,
    "gradinversion": 50,
}


def _defenses() -> tuple[Case, ...]:
    """Return the cases of `defenses`: each attacked by who knows it and by who does not.

    Table 4 of the paper, on a client with SGD with the constants of `_family`; then,
    on one with Adam, its defences against flow_matching and SME, and curves over
    each defence's parameter, with flow_matching. 45, 22 and 28 attacks a draw: with 8
    draws 1.6, 2 and 4 hours of one thread, and 5 for the federations, of which those
    with DP-SGD take half an hour each. ``--cases`` runs a part, for example
    ``--cases noise=gaussian``.
    """
    sgd, adam = replace(_SGD, batch_size=1), replace(_ADAM, batch_size=1)
    adams = _flow(200), AttackConfig("sme", 1000, options={"tv": 0.03})
    sgds = tuple(
        AttackConfig(name, iterations, options=_IN_SHORT.get(name, {}))
        for name, iterations in _IN_TABLE_4.items()
    )
    table_4 = [
        Case(client, attack, defense=defense, defense_known=known, federations=2)
        for client, attacks, more in ((sgd, sgds, ()), (adam, adams, (_FREE_NOISE,)))
        for defense in (NO_DEFENSE, *_PAPERS_DEFENSES, *more)
        for attack in attacks
        for known in ((True,) if defense == NO_DEFENSE else (True, False))
    ]
    curves = [
        Case(adam, adams[0], defense=defense, defense_known=known)
        for defense in _CURVES
        for known in (True, False)
    ]
    return *table_4, *curves


BENCHMARKS: dict[str, tuple[Case, ...]] = {
    "quick": _quick(),
    "matching": _explained(),
    "ablation": _ablation(),
    "tv-weights": _tv_weights(),
    "prior-strength": _prior_strength(),
    "gates": _gates(),
    "distances": _distances(),
    "rates": _rates(),
    "prior": _prior(),
    "models": _models(),
    "closed-form": _closed_form(),
    "batch-sizes": _batch_sizes(),
    "tiny-imagenet": _tiny_imagenet(),
    "family": _family(),
    "defenses": _defenses(),
    "family-constants": _family_constants(),
}
"""The cases of each benchmark, by its name."""
