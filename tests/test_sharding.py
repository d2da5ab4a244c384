"""Programs on meshes give what they give on one device, whatever the mesh.

Values and gradients of the case table's programs are compared with the plain references, and
the transformations are those of `test_transformations`.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import subsets
from cases import CASES, of_size
from meshes import KINDS, mesh, put
from test_transformations import KIND_OF, TRANSFORMATIONS, Subject, assert_close

MESHES = {
    "1": dict(clients=1),
    "2": dict(clients=2),
    "4x2": dict(clients=4, model=2),
    "2x2x2": dict(clients=2, data=2, model=2),
}
SIZES = (7, 8, 13)
NUMBERS = range(len(CASES))


# Values and gradients


def both(fn, case, at_once=False):
    """The outputs of a function like the case's program, and the derivatives of a loss.

    The outputs are those of a call of their own, or else what a derivative computes `at_once`.
    """

    def loss(*differentiable):
        outputs = fn(*case.merge(differentiable))
        total = sum(
            jnp.sum(x**2 + jnp.sin(k + x))
            for k, x in enumerate(jax.tree.leaves(outputs))
            if jnp.issubdtype(x.dtype, jnp.floating)
        )
        return total, outputs

    derive = jax.jacfwd if "reverse" in case.refuses else jax.grad
    gradient = derive(loss, tuple(range(len(case.argnums))), has_aux=True)

    @jax.jit
    def values_and_slopes(*args):
        slopes, outputs = gradient(*(args[i] for i in case.argnums))
        return outputs if at_once else fn(*args), slopes

    return values_and_slopes


@functools.cache
def expected(size, number):
    case = of_size(size)[number]
    return jax.device_get(both(case.reference, case, at_once=True)(*case.args))


def check(number, name, kind, size, vectorize=None):
    case = of_size(size)[number]
    want = expected(size, number)
    on = mesh(kind, **MESHES[name])
    with jax.set_mesh(on):
        args = case.args
        if size % on.shape["clients"] == 0:
            args = jax.tree.map(
                lambda x: put(x, "clients") if np.shape(x)[:1] == (size,) else x, args
            )
        got = both(case.program(vectorize), case)(*args)
    assert_close(got, want)


def label(number, *rest):
    return "-".join([CASES[number].name, *map(str, rest)])


def parametrize(names, choices):
    return pytest.mark.parametrize(names, choices, ids=itertools.starmap(label, choices))


def kind_of_case(number):
    return CASES[number].kind


FULL = list(itertools.product(NUMBERS, KINDS))
SHAPES = list(itertools.product(NUMBERS, MESHES, KINDS, SIZES))


def pairwise():
    """A kind and a size for each case and mesh, so that every pair of the four comes up."""
    kinds = list(KINDS)
    return [
        (number, name, kinds[(number + i) % 4], SIZES[(number + number // 4 + i) % 3])
        for number in NUMBERS
        for i, name in enumerate(MESHES)
    ]


def test_pairwise_subset_covers_every_pair():
    for left, right in itertools.combinations(range(4), 2):
        pairs = {(choice[left], choice[right]) for choice in SHAPES}
        found = {(choice[left], choice[right]) for choice in pairwise()}
        cases_alone = left == 0 and right > 1  # each case has three or four of the others' values
        assert len(found) >= len(pairs) * 3 / 4 if cases_alone else found == pairs


@pytest.mark.long
@parametrize(("number", "kind"), FULL)
def test_every_case_on_4x2_in_every_axis_type(number, kind):
    size = SIZES[(number + list(KINDS).index(kind)) % 3]
    check(number, "4x2", kind, size, vectorize=(None, 2)[number % 2])


@pytest.mark.kinds(number=kind_of_case, name=subsets.alike, kind=subsets.alike, size=subsets.alike)
@parametrize(("number", "name", "kind", "size"), pairwise())
def test_every_case_on_meshes_of_every_shape(number, name, kind, size):
    check(number, name, kind, size, vectorize=(2, None)[number % 2])


# Transformations


# JAX does not serialize any exported function whose results are arrays on a mesh of mixed axes.
TRANSFORMED = [
    (t, kind)
    for t, kind in itertools.product(range(len(TRANSFORMATIONS)), KINDS)
    if TRANSFORMATIONS[t][0] != "eval_shape"
    and (TRANSFORMATIONS[t][0] != "export" or kind in ("auto", "explicit"))
]


def turn(t, kind):
    """A case that allows for the transformation, another one each time."""
    mode, first = TRANSFORMATIONS[t][1], 5 * t + 4 * list(KINDS).index(kind)
    numbers = [(first + k) % len(CASES) for k in NUMBERS]
    # JAX does not vectorize grouped convolutions whose types name a mesh.
    untyped = [n for n in numbers if kind == "auto" or CASES[n].name != "convolutions"]
    return next(n for n in untyped if mode not in CASES[n].refuses)


@pytest.mark.kinds(t=lambda t: KIND_OF[TRANSFORMATIONS[t][0]], kind=subsets.alike)
@pytest.mark.parametrize(
    ("t", "kind"),
    TRANSFORMED,
    ids=lambda x: TRANSFORMATIONS[x][0] if isinstance(x, int) else x,
)
def test_transformations_on_a_mesh(t, kind):
    """What `test_transformations` shows of programs on one device holds on eight."""
    (_, _, transformation), case = TRANSFORMATIONS[t], of_size(7)[turn(t, kind)]
    with jax.set_mesh(mesh(kind, clients=4, model=2)):
        transformation(Subject(case, vectorize=2, program=case.program(2)))
