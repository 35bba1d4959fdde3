"""The web app of `ssm-fast app`; no other part of the package imports it.

`server` starts it, `layout` draws its tabs. What a tab does stands in a module of its own, without
Gradio: `training`, `loading`, `adapting`, `watching`, `kernels`. A tab hands its work to a child
process (`jobs`), and what a visitor has lies with `visitors`.
"""
