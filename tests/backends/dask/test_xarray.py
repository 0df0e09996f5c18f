"""xarray: by ``apply_ufunc``, as docs/dask.md shows, and an error that says so otherwise."""

import numpy as np
import pytest

import mml_arrayapi as mml

xr = pytest.importorskip("xarray")
pytest.importorskip("dask.array")

RNG = np.random.default_rng(0)
N, C = 30, 7


@pytest.fixture(
    params=[None, {"sample": 8}, {"sample": 8, "class": 3}], ids=["numpy", "rows", "both"]
)
def arrays(request):
    """Scores with the classes first, and targets, both with coordinates."""
    labels = [f"s{i}" for i in range(N)]
    scores = xr.DataArray(
        RNG.standard_normal((C, N)).astype(np.float32),
        dims=("class", "sample"),
        coords={"sample": labels},
        name="scores",
    )
    target = xr.DataArray(RNG.integers(0, C, N), dims="sample", coords={"sample": labels})
    if request.param is None:
        return scores, target
    return scores.chunk(request.param), target.chunk({"sample": 8})


def losses_of(scores, target, **options):
    return xr.apply_ufunc(
        mml.multi_margin_loss,
        scores,
        target,
        input_core_dims=[["class"], []],
        kwargs={"reduction": "none", **options},
        dask="allowed",
    )


def test_losses(arrays):
    scores, target = arrays
    losses = losses_of(scores, target)
    assert losses.dims == ("sample",)
    assert (losses.sample == scores.sample).all()
    assert (losses.chunks is None) == (scores.chunks is None)
    wanted = mml.multi_margin_loss(scores.values.T, target.values, reduction="none")
    np.testing.assert_allclose(losses.values, wanted, rtol=1e-6)


def test_mean_and_gradient(arrays):
    scores, target = arrays
    loss, grad = xr.apply_ufunc(
        mml.multi_margin_loss_and_grad,
        scores,
        target,
        input_core_dims=[["sample", "class"], ["sample"]],
        output_core_dims=[[], ["sample", "class"]],
        dask="allowed",
    )
    wanted = mml.multi_margin_loss_and_grad(scores.values.T, target.values)
    np.testing.assert_allclose(loss.values, wanted[0], rtol=1e-6)
    assert grad.dims == ("sample", "class")
    np.testing.assert_allclose(grad.values, wanted[1], rtol=1e-6)


def test_a_data_array_is_an_error_that_says_what_to_do(arrays):
    scores, target = arrays
    for pair in ((scores, target), (scores.data, target), (scores.data, target.data)):
        names = ["input" if pair[0] is scores else "target"]
        if pair[1] is target.data:
            mml.multi_margin_loss(*pair, axis=0)
            continue
        with pytest.raises(TypeError, match=rf"{names[0]} .*xarray.*\.data.*apply_ufunc"):
            mml.multi_margin_loss(*pair, axis=0)
