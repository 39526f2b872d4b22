"""Page: error of each approximation along training, layer by layer."""

import streamlit as st

from kronscope.app import common
from kronscope.studies.reports import figures, summaries

st.title("Along training")
st.markdown("How far each approximation is from a layer's exact curvature, at each measured step.")
run = common.open_run()
rows = run.frame[run.frame["approximation"] != ""]
if rows.empty:
    common.say_nothing_compared(run, "the figure appears")
    st.stop()

places = st.columns(4)
metric = common.choose(
    "Metric",
    summaries.in_order(rows["metric"]),
    "metric",
    show=summaries.label,
    about=run.about,
    where=places[0],
)
rows = figures.select(rows, metric=metric)
truth = common.choose(
    "Exact matrix", sorted(rows["truth"].unique()), "truth", show=summaries.label, where=places[1]
)
rows = figures.select(rows, truth=truth)
optimizer = common.choose(
    "Trained with", sorted(rows["optimizer"].unique()), "optimizer", where=places[2]
)
rows = figures.select(rows, optimizer=optimizer)
dampings = sorted(rows["damping"].dropna().unique())
damping = None
if dampings:
    damping = common.choose("Damping λ", dampings, "damping", where=places[3])
    rows = figures.select(rows, damping=damping)

common.draw(figures.error_along_training(run.frame, metric, truth, optimizer, damping))
st.caption(
    run.about(metric) + ". One panel per layer; bands are 95 % intervals over the sample. Black: "
    "the best possible Kronecker product. Dashed grey: sampling noise of the exact block itself; "
    "errors below it cannot be told apart from it."
)
st.download_button(
    f"Download these {len(rows):,} records (CSV)",
    rows.to_csv(index=False),
    file_name=f"{run.folder.name}-{metric}-{truth}-{optimizer}.csv",
    mime="text/csv",
)
