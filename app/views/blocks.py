"""Page: a layer's exact block, an approximation and their difference, with all metrics."""

import pandas as pd
import streamlit as st

from kronscope.app import common
from kronscope.studies.reports import figures, summaries
from kronscope.studies.results import records

st.title("Block inspector")
st.markdown("One layer's exact curvature, an approximation of it and their difference.")
run = common.open_run()
compared = run.frame[run.frame["approximation"] != ""]
stored = common.matrices(run.folder)
places = pd.concat([own for own in (compared, stored) if not own.empty] or [compared])
if places.empty:
    common.say_nothing_compared(run, "its blocks appear")
    st.stop()

boxes = st.columns(5)
optimizer = common.choose(
    "Trained with", sorted(places["optimizer"].unique()), "optimizer", where=boxes[0]
)
places = figures.select(places, optimizer=optimizer)
stored = stored[stored["optimizer"] == optimizer]
steps, drawn = (sorted(int(s) for s in own["step"].unique()) for own in (places, stored))
step = common.choose("Step", steps, "step", default=(drawn or steps)[-1], where=boxes[1])
places = figures.select(places, step=step)
blocks = sorted(places["block"].unique(), key=figures.natural)
sizes = dict(zip(places["block"], places["size"], strict=True))
block = common.choose(
    "Layer", blocks, "block", show=lambda name: figures.layer(name, sizes[name]), where=boxes[2]
)
rows = compared[(compared["optimizer"] == optimizer) & (compared["step"] == step)]
rows = rows[rows["block"] == block]
stored = stored[(stored["step"] == step) & (stored["block"] == block)]

truths = sorted({*rows["truth"], *stored["truth"]})
truth = common.choose("Exact matrix", truths, "truth", show=summaries.label, where=boxes[3])
rows = rows[rows["truth"] == truth]
paths = list(stored.loc[stored["truth"] == truth, "path"])
found = common.pictures(paths[0]) if paths else {}
pictured = {name for name in found if records.difference_name(name) in found}
names = sorted(pictured or set(rows["approximation"]))
if names:
    name = common.choose("Approximation", names, "approximation", default="kfac", where=boxes[4])
if pictured:
    triple = (found["exact"], found[name], found[records.difference_name(name)])
    common.draw(figures.matrix_triptych(triple, (truth, name), int(sizes[block])))
else:
    where = f"; of {optimizer} at {', '.join(map(str, drawn))}" if drawn else ""
    st.info(
        f"No matrices are stored for this choice: studies keep them at the first and last step"
        f"{where}."
    )

st.subheader(f"All approximations of this layer's {summaries.label(truth)}: value [interval]")
if rows.empty:
    st.info("Nothing was measured of this layer at this step.")
else:
    common.show_table(run, common.with_intervals(rows))
