"""Which runs are there, and what does the chosen one say?"""

import pandas as pd
import streamlit as st

from app import common
from studies import figures, summaries

st.title("Overview")
rows = []
for folder in common.run_folders():
    run = common.load(folder)
    facts = {name: run.header.get(name, "unknown") for name in ("study", "problem", "status")}
    created = run.header.get("created", "unknown")
    rows.append({"run": folder.name, **facts, "created": created, "records": len(run.frame)})
if rows:
    st.dataframe(pd.DataFrame(rows), hide_index=True)

run = common.open_run()
st.header(run.folder.name)
st.caption(
    " · ".join(f"{name} {run.header[name]}" for name in ("device", "commit") if name in run.header)
)
verdicts = summaries.verdicts(run.frame)
if verdicts:
    st.subheader("Verdict")
    st.markdown("\n".join(f"- **{place}**: {verdict}" for place, verdict in verdicts.items()))
else:
    st.info("No verdict yet: it needs records of the metric `relative_error`.")

truths = sorted(set(run.frame["truth"]) - {""})
if truths:
    st.subheader("Each approximation at the last step, median over the layers")
    truth = common.choose("Compared with the exact", truths, "truth", show=summaries.label)
    table = summaries.medians(run.frame, truth).drop(index="", level="approximation")
    common.show_table(run, table.dropna(axis="columns", how="all").map(summaries.number))

st.subheader("Loss")
try:
    common.draw(figures.loss_curves(run.frame))
except ValueError as error:
    st.info(f"No loss curves: {error}")
