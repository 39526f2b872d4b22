"""Figures say what they show: axes, panels, legends, colours; odd numbers do not upset them."""

import io

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex

from kronscope.studies.reports import figures, summaries
from kronscope.studies.results import records
from tests.synthetic import METRICS, row, rows

METRICS = sorted(set(METRICS) - {"noise_floor"})


@pytest.fixture(scope="module")
def frame():
    return records.frame_of(rows(steps=(0, 50, 100)))


@pytest.fixture(scope="module")
def small(frame):
    """Two layers of six."""
    return frame[frame["block"].isin(["", "0", "10"])]


def rendered(figure):
    """Render at low resolution: what cannot be laid out warns, and warnings are errors."""
    figure.savefig(io.BytesIO(), format="png", dpi=30)
    return figure


def legend(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


def line_colours(axes):
    """Colours of the lines of a panel, by marker (markers differ between names)."""
    return {line.get_marker(): to_hex(line.get_color()) for line in axes.lines}


def test_loss_curves_have_a_panel_per_loss_and_a_line_per_optimizer(frame):
    figure = rendered(figures.loss_curves(frame))
    assert [axes.get_title() for axes in figure.axes] == ["train loss", "test loss"]
    assert [len(axes.lines) for axes in figure.axes] == [3, 3]
    assert legend(figure) == ["adam", "kbfgs", "kfac"]
    assert figure.axes[0].get_xlabel() == "step"
    assert figure.get_supylabel() == "loss (mean per example)"
    assert figure.axes[0].get_yscale() == "log"


def test_losses_below_one_and_steps_far_apart_have_labels_that_can_be_read(frame):
    rows = frame[frame["metric"] == "train_loss"].copy()
    few, many = (rows[rows["optimizer"] == name].copy() for name in ("adam", "kfac"))
    few["value"], many["value"] = [2.3, 0.5, 0.3], [2.3, 0.9, 0.4]
    few["step"], many["step"] = [0, 60, 120], [0, 600, 1200]
    (axes,) = rendered(figures.loss_curves(pd.concat([few, many]))).axes
    shown = [text.get_text() for text in axes.get_yticklabels(minor=True)]
    assert {"0.3", "0.4", "2"} <= set(shown)
    assert not any("e" in text for text in shown)
    assert [text.get_text() for text in axes.get_xticklabels()] == ["0", "100", "1000"]


def test_published_curves_are_pale_and_have_no_seconds(frame):
    rows = frame[frame["metric"] == "train_loss"]
    theirs = rows[rows["optimizer"] == "kfac"].assign(optimizer="kfac, published", seconds=np.nan)
    both = pd.concat([rows, theirs])
    ours, pale = (figures.looks(both["optimizer"])[n] for n in ("kfac", "kfac, published"))
    assert ours["color"] == pale["color"]
    assert pale["alpha"] < 0.5 < pale["linewidth"] / ours["linewidth"]
    assert "kfac, published" in legend(rendered(figures.loss_curves(both)))
    assert "kfac, published" not in legend(rendered(figures.loss_curves(both, "seconds")))


def test_evaluations_dense_at_first_have_a_logarithm_of_the_seconds(frame):
    rows = frame[(frame["metric"] == "train_loss") & (frame["optimizer"] == "kfac")]
    rows = pd.concat([rows] * 3).assign(step=range(9), epoch=range(9))
    for seconds, scale in ((np.geomspace(3, 500, 8), "log"), (np.linspace(60, 500, 8), "linear")):
        drawn = rows.assign(seconds=[0.0, *seconds])
        (axes,) = rendered(figures.loss_curves(drawn, "seconds")).axes
        assert axes.get_xscale() == scale
        assert axes.get_xlim()[1] > 500
        assert (min(axes.lines[0].get_xdata()) > 0) == (scale == "log")  # no start on a log
        assert not any("e" in text.get_text() for text in axes.get_xticklabels(which="both"))


def test_losses_and_accuracies_by_epoch_and_by_seconds(frame):
    rows = frame[frame["metric"] == "train_loss"].copy()
    rows["metric"] = "train_accuracy"
    rows["value"] = 1 - rows["value"] / 100
    rows["seconds"] = 2.0 * rows["step"]
    rows = pd.concat([rows, rows.assign(seed=1, seconds=4.0 * rows["step"])])
    figure = rendered(figures.accuracy_curves(rows, "seconds"))
    (axes,) = figure.axes
    assert axes.get_xlabel() == "seconds of training"
    assert axes.get_yscale() == "linear"
    assert list(axes.lines[0].get_xdata()) == [0, 150, 300]  # medians of the two seeds
    assert figure.get_supylabel() == "share of examples put into the right class"
    epochs = rendered(figures.loss_curves(frame, "epoch"))
    assert epochs.axes[0].get_xlabel() == "epoch"
    assert list(epochs.axes[0].lines[0].get_xdata()) == [0, 50 / 15, 100 / 15]


def test_loss_curves_do_not_lean_on_an_interval_or_a_finite_loss(frame):
    rows = frame.copy()
    rows.loc[(rows["optimizer"] == "adam") & (rows["step"] == 100), "value"] = np.inf
    assert "infinite" in legend(rendered(figures.loss_curves(rows)))


def test_error_along_training_has_a_panel_per_layer_in_natural_order(frame):
    figure = figures.error_along_training(frame, "relative_error", "ggn", "kbfgs")
    titles = [axes.get_title() for axes in figure.axes]
    assert titles[0] == "layer 0 · d = 3,120"
    assert titles[-2:] == ["layer 8 · d = 1,200", "layer 10 · d = 3,136"]
    assert len(titles) == 6
    names = ["best_kronecker", "diagonal", "kbfgs_live", "kfac", "mini_block", "noise floor"]
    assert legend(figure) == names
    assert [len(axes.lines) for axes in figure.axes] == [len(names)] * 6
    assert [len(axes.collections) for axes in figure.axes] == [len(names)] * 6  # bands
    assert figure.get_supylabel() == "relative Frobenius error"
    assert figure.get_suptitle() == "Trained with kbfgs, compared with the exact GGN"
    assert {axes.get_ylim() for axes in figure.axes} == {figure.axes[0].get_ylim()}


@pytest.mark.parametrize("metric", METRICS)
def test_every_metric_can_be_drawn(small, metric):
    along = rendered(figures.error_along_training(small, metric, "hessian", "kbfgs"))
    assert len(along.axes) == 2
    blocks = rendered(figures.error_by_block(small, metric, "hessian"))
    assert len(blocks.axes) == 3
    damped = metric in ("step_cosine", "preconditioned_condition")
    for figure in (along, blocks):
        label = summaries.label(metric) + (" (λ = 0.3)" if damped else "")
        assert figure.get_supylabel() == label


def test_noise_is_drawn_only_where_it_has_the_unit(small):
    assert "noise floor" in legend(figures.error_by_block(small, "relative_error", "ggn"))
    assert "noise floor" not in legend(figures.error_by_block(small, "cosine", "ggn"))
    assert "noise floor" not in legend(
        figures.error_along_training(small, "step_cosine", "ggn", "adam")
    )


def test_a_name_keeps_its_colour_in_all_figures_of_a_run(small):
    found = [
        line_colours(figures.error_along_training(small, metric, "ggn", optimizer).axes[0])
        for metric in ("relative_error", "cosine")
        for optimizer in ("adam", "kbfgs", "kfac")
    ]
    found.append(line_colours(figures.error_by_block(small, "cosine", "ggn").axes[0]))
    for colours in found:
        common = colours.keys() & found[0].keys() - {"None"}
        assert len(common) >= 4
        assert all(colours[marker] == found[0][marker] for marker in common)


def test_looks_depend_on_the_set_of_names_and_differ_without_colour():
    names = [f"method {i}" for i in range(20)]
    looks = figures.looks(names)
    assert looks == figures.looks(reversed(names))
    greys = {(look["marker"], str(look.get("linestyle"))) for look in looks.values()}
    assert len(greys) == 21  # with the best Kronecker
    assert len({(str(look["color"]), look["marker"]) for look in looks.values()}) == 21
    assert looks["best_kronecker"]["color"] == "black"


def test_a_single_step_shows_points_with_intervals_and_the_noise(small):
    one = small[small["step"] == 0]
    figure = rendered(figures.error_along_training(one, "relative_error", "ggn", "kbfgs"))
    assert figure.axes[0].get_xticks().tolist() == [0]
    (floor,) = (
        line for line in figure.axes[0].lines if list(line.get_xdata()) == [0, 1]
    )  # across the panel
    assert floor.get_linestyle() == "--"


def test_infinite_values_are_marked_and_named(small):
    figure = rendered(figures.error_by_block(small, "preconditioned_condition", "hessian"))
    assert legend(figure)[-1] == "infinite"
    marked = [line for line in figure.axes[1].lines if line.get_marker() == r"$\infty$"]
    assert len(marked) == 1
    everywhere = small.assign(value=np.inf, low=np.nan, high=np.nan)
    rendered(figures.error_along_training(everywhere, "relative_error", "ggn", "kbfgs"))


def test_what_a_logarithm_cannot_show_is_marked_and_does_not_stretch_the_axis(small):
    chosen = (small["approximation"] == "mini_block") & (small["metric"] == "relative_error")
    rows = small.assign(low=0.0)  # intervals of small errors reach down to zero
    rows.loc[chosen, "value"] = 1e-17
    for figure in (
        rendered(figures.error_along_training(rows, "relative_error", "ggn", "adam")),
        rendered(figures.error_by_block(rows, "relative_error", "ggn")),
    ):
        assert "zero up to rounding" in legend(figure)
        assert figure.axes[0].get_ylim()[0] > 1e-3
        marked = [line for line in figure.axes[0].lines if line.get_marker() == "$0$"]
        assert len(marked) == 1


def test_scales_follow_the_data(small):
    def scale(metric, values):
        rows = small[small["metric"] == "relative_error"].copy()
        rows["value"], rows["metric"] = np.resize(values, len(rows)), metric
        axes = rendered(figures.error_along_training(rows, metric, "ggn", "adam")).axes[0]
        return axes.get_yscale()

    assert scale("new", [0.1, 5.0]) == "log"
    assert scale("new", [0.0, 0.1, 5.0]) == "log"
    assert scale("new", [0.5, 0.7]) == "linear"
    assert scale("new", [-0.3, 0.5]) == "linear"
    assert scale("new", [-300.0, 0.5]) == "symlog"
    assert scale("new", [0.0]) == "linear"
    assert scale("cosine", [0.01, 0.9]) == "linear"


def test_numbers_in_print():
    numbers = [0.0, -3e-13, 0.93, 310, 2e-5, np.inf, -np.inf, np.nan]
    printed = ["0", "≈ 0", "0.930", "310", "2.00e-05", "∞", "−∞", "–"]
    assert [summaries.number(value) for value in numbers] == printed


def test_seeds_give_a_median_and_a_range():
    seeds = records.frame_of(
        row(optimizer="adam", step=step, seed=seed, metric="a_loss", value=seed + 1.0)
        for step in (0, 1)
        for seed in (0, 1, 4)
    )
    axes = figures.loss_curves(seeds).axes[0]
    assert axes.lines[0].get_ydata().tolist() == [2, 2]
    heights = axes.collections[0].get_paths()[0].vertices[:, 1]
    assert (heights.min(), heights.max()) == (1, 5)


def test_names_nobody_has_heard_of_appear(small):
    rows = small.replace({"kfac": "new_method", "relative_error": "new_metric"})
    figure = rendered(figures.error_along_training(rows, "new_metric", "ggn", "adam"))
    assert "new_method" in legend(figure)
    assert figure.get_supylabel() == "new metric"


def test_errors_name_what_there_is(frame):
    with pytest.raises(ValueError, match=r"no records with metric 'cosin'; known: \['cosine'"):
        figures.error_by_block(frame, "cosin", "ggn")
    with pytest.raises(ValueError, match="no records with optimizer 'sgd'"):
        figures.error_along_training(frame, "cosine", "ggn", "sgd")
    for draw in (figures.loss_curves, lambda f: figures.error_by_block(f, "cosine", "ggn")):
        with pytest.raises(ValueError, match="no records"):
            draw(records.frame_of([]))


def test_triptych_has_one_symmetric_scale():
    exact = np.diag([5.0, -0.01, 0.0])
    figure = rendered(figures.matrix_triptych((exact, 2 * exact, exact), ("ggn", "kfac"), 3))
    panels = figure.axes[:3]
    assert [axes.get_title() for axes in panels] == ["exact GGN", "kfac", "kfac − exact"]
    norms = {id(axes.images[0].norm) for axes in panels}
    assert len(norms) == 1
    norm = panels[0].images[0].norm
    assert (norm.vmin, norm.vmax) == (-10, 10)
    np.testing.assert_array_equal(panels[2].images[0].get_array(), exact)
    assert figure.get_supxlabel() == "d = 3, every entry shown"


@pytest.mark.parametrize("value", [0.0, np.nan, np.inf])
def test_triptych_of_odd_matrices(value):
    odd = np.full((4, 4), value)
    triple = (np.zeros((4, 4)), odd, odd)
    figure = rendered(figures.matrix_triptych(triple, ("hessian", "new"), 1000))
    assert "d = 1,000 reduced to 4 × 4" in figure.get_supxlabel()


def test_triptych_refuses_different_shapes():
    with pytest.raises(ValueError, match="shapes differ"):
        figures.matrix_triptych((np.eye(2), np.eye(3), np.eye(3)), ("ggn", "kfac"), 2)


def test_verdicts_are_computed_from_the_numbers():
    numbers = {"kfac": 0.6, "diagonal": 0.9, "best_kronecker": 0.5, "kbfgs_live": 2.0}
    place = {"optimizer": "kbfgs", "step": 7, "block": "0", "truth": "ggn"}
    rows = [row(**place, metric="noise_floor", value=0.3)]
    for name, error in numbers.items():
        rows.append(row(**place, metric="relative_error", approximation=name, value=error))
        rows.append(row(**place, metric="step_cosine", approximation=name, value=1 - error / 4))
    rows.append(row(**place | {"step": 3}, metric="relative_error", approximation="old", value=0.1))
    assert summaries.verdicts(records.frame_of(rows)) == {
        "Exact GGN, kbfgs at step 7": "kfac is closest, with a relative error of 0.600 (median "
        "over the layers), 1.20 times that of the best possible Kronecker product and 2.0 times "
        "the sampling noise of the exact block itself (0.300); what the optimizer itself applies "
        "(kbfgs_live, damping included) is at 2.00; the step nearest to the exact one is kfac's "
        "(median cosine 0.850)."
    }


def test_verdicts_need_errors(frame):
    assert summaries.verdicts(records.frame_of([])) == {}
    assert summaries.verdicts(frame[frame["metric"] == "cosine"]) == {}
    assert len(summaries.verdicts(frame[frame["metric"] == "relative_error"])) == 6
