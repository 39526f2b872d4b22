"""The dashboard's entry: `streamlit run app/main.py -- --results results`."""

import streamlit as st

st.set_page_config(page_title="Kronscope", layout="wide")
st.navigation(
    [
        st.Page("views/overview.py", title="Overview", icon=":material/home:"),
        st.Page("views/along_training.py", title="Along training", icon=":material/timeline:"),
        st.Page("views/blocks.py", title="Block inspector", icon=":material/grid_on:"),
    ]
).run()
