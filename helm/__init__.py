"""The Helm chart, and what writes its generated files.

The chart is in `llm-extproc/`. Begin with `values.py`: every value with its type and meaning; their
sections are in `sections.py`.
`generate.py` writes the chart's values.yaml, its schema and the table of its README.
"""
