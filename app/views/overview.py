"""Page: the list of runs, and verdict, tables and curves of the chosen one."""

import pandas as pd
import streamlit as st

from kronscope.app import common
from kronscope.studies.reports import figures, report, summaries
from kronscope.studies.results import records

st.title("Overview")
rows = []
for folder in common.run_folders():
    header = records.read_header(folder)
    facts = {name: header.get(name, "unknown") for name in ("study", "problem", "status")}
    created = header.get("created", "unknown")
    rows.append({"run": folder.name, **facts, "created": created, "records": common.count(folder)})
if rows:
    st.caption("All runs in this folder, newest first. The one chosen on the left is shown below.")
    st.dataframe(pd.DataFrame(rows), hide_index=True)

run = common.open_run()
st.header(run.folder.name)
st.caption(
    " · ".join(f"{name} {run.header[name]}" for name in ("device", "commit") if name in run.header)
)
if "question" in run.header:
    st.markdown(run.header["question"])
verdicts = summaries.verdicts(run.frame)
tables = {title: run.header[key] for key, title in summaries.TABLES.items() if key in run.header}
if verdicts:
    st.subheader("Verdict")
    st.markdown("\n".join(f"- **{place}**: {verdict}" for place, verdict in verdicts.items()))
elif not tables:
    st.info("No verdict yet: it needs measured errors (metric `relative_error`).")
for title, table in tables.items():
    st.subheader(title)
    content = pd.DataFrame(table["rows"], columns=table["columns"])
    st.dataframe(content, hide_index=True, height="content")
    st.caption(table["caption"])
if claims := run.header.get("claims"):
    st.subheader("The paper's claims")
    st.markdown("\n".join(f"- {claim}" for claim in claims))

for number, picture in enumerate(report.of_study(run.frame, run.header)):
    if number == 0:
        st.subheader("Figures of this study")
    common.draw(picture.figure)
    st.caption(picture.caption)

medians = {
    truth: summaries.medians(run.frame, truth)
    .drop(index="", level="approximation", errors="ignore")
    .dropna(axis="columns", how="all")
    for truth in sorted(set(run.frame["truth"]) - {""})
}
truths = [truth for truth, table in medians.items() if not table.empty]
if truths:
    st.subheader("Error of each approximation at the last step")
    st.caption(
        "Medians over the layers. A column's tooltip has its formula, range and best value; "
        "best_kronecker is the least error that any Kronecker product can have."
    )
    truth = common.choose("Compared with the exact", truths, "truth", show=summaries.label)
    common.show_table(run, medians[truth].map(summaries.number))

shown = summaries.drawn(run.frame, run.header)
pictures = {"Loss": figures.loss_curves, "Accuracy": figures.accuracy_curves}
for title, draw in pictures.items():
    if shown["metric"].str.endswith(f"_{title.lower()}").any():
        st.subheader(title)
        x = common.choose("Along", ["step", "epoch", "seconds"], f"{title.lower()}-against")
        common.draw(draw(shown, x))
    elif title == "Loss":
        st.info("No loss curves: this run has recorded no loss.")
