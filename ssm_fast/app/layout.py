"""The page: five tabs over the handlers, and a row that names the policy in hand."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import gradio as gr
import pandas as pd

from ssm_fast.app import adapting, kernels, loading, training, watching
from ssm_fast.app.fields import SEED, Count, Fraction
from ssm_fast.app.status import IS_ERROR, Status, View, as_html
from ssm_fast.app.visitors import Visitor, Visitors

NO_POLICY = "none yet: train one or load one"
MOST_WAITING = 32  # events in the queue, over all visitors
CSS = """
.gradio-container { width: 100% !important; max-width: 1180px !important; margin: 0 auto !important; }
footer { display: none !important; }
.title h1 { font-size: 1.7rem; margin: 0; }
.title p { color: var(--body-text-color-subdued); margin: 0; }
.header { align-items: center; }
#adapt-task input, #watch-task input { text-overflow: ellipsis; padding-right: 1.8rem; }
.one-a-line label { width: 100%; }
.line .html-container { padding: 0 !important; }
.status { padding: 0.6rem 0.8rem; border: 1px solid var(--border-color-primary); border-radius: var(--radius-md);
  background: var(--background-fill-secondary); overflow-wrap: anywhere; }
.status.error { border-color: var(--error-border-color); background: var(--error-background-fill); }
.status .bar { height: 6px; margin-top: 0.5rem; border-radius: 3px; background: var(--border-color-primary);
  overflow: hidden; }
.status .bar div { height: 100%; border-radius: 3px; background: var(--color-accent); transition: width 0.4s; }
.status .bar.unknown div { width: 30%; animation: to-and-fro 1.6s ease-in-out infinite alternate; }
@keyframes to-and-fro { from { margin-left: 0; } to { margin-left: 70%; } }
.status ul { margin: 0.4rem 0 0 1.2rem; }
"""

_FORMAT = ",.6~g"  # of D3: 500 and not 500.000000

_NO_FILM = "No film of this policy yet."

# The browser asks before it closes or reloads a page that has something to lose. Gradio has a listener
# of its own, which ends the session whatever the answer is: this one must be there first.
SCRIPT = """<script>
window.addEventListener("beforeunload", (event) => {
  if (!document.querySelector("[data-would-lose]")) return;
  event.preventDefault();
  event.stopImmediatePropagation();
});
</script>"""
_WOULD_LOSE = "<i data-would-lose></i>"

Components = list[Any]
V = TypeVar("V", bound=View)


@dataclass(frozen=True)
class _Page:
    """What the tabs share."""

    visitors: Visitors
    policy: gr.Dropdown
    would_lose: gr.HTML  # `_WOULD_LOSE`, or nothing


@dataclass(frozen=True)
class _Panel:
    """The buttons and the status line of a tab."""

    start: gr.Button
    stop: gr.Button
    status: gr.HTML


def theme() -> gr.themes.Base:
    """Gradio's own, with fainter texts that can be read."""
    return gr.themes.Default().set(
        body_text_color_subdued="*neutral_500",
        block_info_text_color="*neutral_500",
        input_placeholder_color="*neutral_400",
    )


def build(visitors: Visitors) -> gr.Blocks:
    """The page, to be launched with `CSS`, `SCRIPT` and `theme`."""
    blocks = gr.Blocks(title="ssm_fast", analytics_enabled=False, delete_cache=(3600, 86400))
    with blocks:
        with gr.Row(elem_classes="header"):
            with gr.Column(scale=2, min_width=260):
                gr.HTML(
                    "<h1>ssm_fast</h1>"
                    "<p>Train a recurrent policy, adapt it to a task, watch it play.</p>",
                    elem_classes="title",
                )
            policy = gr.Dropdown(
                [], label="Policy in hand", info=NO_POLICY, scale=4, min_width=320, elem_id="policy"
            )
            download = gr.DownloadButton(
                "Download", interactive=False, scale=1, min_width=120, elem_id="download"
            )
        page = _Page(visitors, policy, gr.HTML(visible="hidden"))
        with gr.Tab("Train"):
            _train_tab(page)
        with gr.Tab("Load"):
            _load_tab(page)
        with gr.Tab("Adapt"):
            method, adapt_task = _adapt_tab(page)
        with gr.Tab("Watch"):
            watch_task, film, film_status = _watch_tab(page)
        with gr.Tab("Kernels"):
            _kernels_tab(page)

        def choose(name: str | None, method: str, request: gr.Request) -> Components:
            policies = _visitor(visitors, request).policies
            if name not in policies:
                return [
                    gr.Dropdown(info=NO_POLICY),
                    gr.DownloadButton(interactive=False),
                    *[gr.skip()] * 5,
                ]
            chosen = policies[name]
            info = f"{chosen.model}, {chosen.parameters:,} weights, for {chosen.env_id}"
            tasks = adapting.task_choices(chosen.env_id)
            button = gr.DownloadButton(value=chosen.path, interactive=True)
            no_film = as_html(Status(_NO_FILM))
            return [
                gr.Dropdown(info=info),
                button,
                gr.Dropdown(tasks, value=adapting.first_task(chosen)),
                gr.Dropdown(tasks, value=chosen.task),
                adapting.first_method(chosen, method),
                None,
                no_film,
            ]

        def downloaded(name: str | None, request: gr.Request) -> str:
            visitor = _visitor(visitors, request)
            visitor.downloaded(name)
            return _lost(visitor)

        outputs = [policy, download, adapt_task, watch_task, method, film, film_status]
        policy.change(choose, [policy, method], outputs, **_QUIET, queue=False)
        download.click(downloaded, policy, page.would_lose, **_QUIET, queue=False)
        blocks.unload(_leave(visitors))
    blocks.queue(max_size=MOST_WAITING)
    return blocks


# Tabs


def _train_tab(page: _Page) -> None:
    first = next(iter(training.MODES))
    with gr.Row():
        with gr.Column(scale=2, min_width=320):
            mode = gr.Radio(
                [(f"{name}: {what}", name) for name, what in training.MODES.items()],
                value=first,
                label="Mode",
                elem_classes="one-a-line",
            )
            env_id = gr.Dropdown(
                training.ENVIRONMENTS[first],
                label="Environment",
                info="or type any registered Gymnasium id",
                allow_custom_value=True,
                elem_id="environment",
            )
            first_env = training.ENVIRONMENTS[first][0]
            amount = gr.Number(**_amount(first, first_env), elem_id="amount")
            with gr.Accordion("More options", open=False):
                fields = _option_fields(
                    training.OPTIONS, partial(training.default_of, first, first_env)
                )
            start, stop = _buttons("Train")
        with gr.Column(scale=3, min_width=400):
            status = _status_line("Nothing is training. Choose a mode and press Train.")
            curve = gr.LinePlot(
                x="environment steps",
                y="return",
                color="line",
                color_title=" ",
                y_axis_format=_FORMAT,
                label="Learning curve",
            )

    def show_mode(mode: str) -> Components:
        environments = training.ENVIRONMENTS[mode]
        return [
            gr.Dropdown(environments, value=environments[0]),
            *show_settings(mode, environments[0]),
        ]

    def show_settings(mode: str, env_id: str | None) -> Components:
        return [
            gr.Number(**_amount(mode, env_id)),
            *(_default(training.default_of(mode, env_id, name)) for name in fields),
        ]

    def train(
        visitor: Visitor, mode: str, env_id: str, amount: int | None, *values: float | None
    ) -> Iterator[training.TrainView]:
        form = dict(zip(fields, values, strict=True))
        return training.train(visitor, mode, env_id, {training.UNIT_OF[mode]: amount, **form})

    def show(view: training.TrainView) -> Components:
        return [_frame(view.curve, ["environment steps", "return", "line"])]

    settings = [amount, *fields.values()]
    mode.change(show_mode, mode, [env_id, *settings], **_QUIET, queue=False)
    env_id.change(show_settings, [mode, env_id], settings, **_QUIET, queue=False)
    _bind(
        page,
        _Panel(start, stop, status),
        training.KIND,
        train,
        [mode, env_id, amount, *fields.values()],
        show,
        [curve],
        at_once=os.cpu_count() or 1,
    )


def _amount(mode: str, env_id: str | None) -> dict[str, Any]:
    """The field of the steps, episodes or epochs."""
    return {
        "value": training.amount_of(mode, env_id),
        "label": training.AMOUNTS[training.UNIT_OF[mode]].label,
        "info": training.settings_in_words(mode, env_id),
    }


def _load_tab(page: _Page) -> None:
    names = loading.pretrained_names()
    status = _status_line("A file is checked before it is used, and runs no code.")
    with gr.Row():
        with gr.Column():
            file = gr.File(
                label="A checkpoint (.safetensors)", file_types=[".safetensors"], height=150
            )
            env_id = gr.Textbox(
                label="Environment",
                info="needed only where the file does not name its own",
                placeholder="CartPole-v1",
            )
            load = gr.Button("Load the file", variant="primary")
        with gr.Column():
            if not names:
                _status_line("No pretrained policy comes with this version.")
            shipped = gr.Radio(names, label="Pretrained policies", visible=bool(names))
            load_shipped = gr.Button("Load the pretrained policy", visible=bool(names))

    def loaded(visitor: Visitor, views: Iterator[loading.LoadView]) -> Components:
        view = list(views)[-1]
        return [as_html(view.status), _choices(visitor, view)]

    def upload(file: str | None, env_id: str | None, request: gr.Request) -> Components:
        visitor = _visitor(page.visitors, request)
        return loaded(visitor, loading.load_upload(visitor, file, env_id))

    def load_pretrained(name: str | None, request: gr.Request) -> Components:
        visitor = _visitor(page.visitors, request)
        return loaded(visitor, loading.load_pretrained(visitor, name))

    outputs = [status, page.policy]
    gr.on([file.upload, load.click], upload, [file, env_id], outputs, **_QUIET, concurrency_limit=2)
    load_shipped.click(load_pretrained, shipped, outputs, **_QUIET, concurrency_limit=2)
    _clear_error(status, [file.clear, env_id.input, shipped.input])


def _adapt_tab(page: _Page) -> tuple[gr.Radio, gr.Dropdown]:
    first = next(iter(adapting.METHODS))
    with gr.Row():
        with gr.Column(scale=2, min_width=320):
            method = gr.Radio(
                [(f"{name}: {what}", name) for name, what in adapting.METHODS.items()],
                value=first,
                label="Method",
                elem_classes="one-a-line",
            )
            task = gr.Dropdown(
                [("as it was trained", adapting.USUAL_TASK)],
                value=adapting.USUAL_TASK,
                label="Task",
                info="held-out tasks of the family around the policy's environment",
                elem_id="adapt-task",
            )
            with gr.Accordion("More options", open=False):
                fields = _option_fields(adapting.OPTIONS, partial(adapting.default_of, first))
            start, stop = _buttons("Adapt")
        with gr.Column(scale=3, min_width=400):
            status = _status_line("Nothing is adapting. The policy in hand is never changed.")
            take = gr.Button("Take the adapted policy", visible=False, elem_id="take")
            adapted = gr.State(None)  # its name
            curve = gr.LinePlot(
                x="episode",
                y="return",
                color="line",
                color_title=" ",
                y_axis_format=_FORMAT,
                sort=[str(i) for i in range(adapting.MOST_EPISODES + 1)],
                label="Return of each episode, or after each gradient step",
            )
            table = gr.Dataframe(
                headers=["", "not adapting", "adapting", "difference"],
                datatype=["str", "number", "number", "number"],
                label="Returns",
                interactive=False,
                row_count=1,
            )

    def adapt(
        visitor: Visitor, name: str | None, method: str, task: str, *values: float | None
    ) -> Iterator[adapting.AdaptView]:
        return adapting.adapt(visitor, name, method, task, dict(zip(fields, values, strict=True)))

    def show(view: adapting.AdaptView) -> Components:
        return [
            _frame([(str(i), *rest) for i, *rest in view.curve], ["episode", "return", "line"]),
            [list(row) for row in view.table] or None,
            gr.Button(visible=view.adapted is not None),
            view.adapted,
        ]

    def show_method(method: str, policy: str | None, task: str, request: gr.Request) -> Components:
        return [_default(default(name, method, policy, task, request)) for name in fields]

    def show_stretch(method: str, policy: str | None, task: str, request: gr.Request) -> Any:
        return _default(default("adapt_every", method, policy, task, request))

    def default(
        option: str, method: str, policy: str | None, task: str, request: gr.Request
    ) -> float | None:
        policies = _visitor(page.visitors, request).policies
        env_id = policies[policy].env_id if policy in policies else ""
        return adapting.default_of(method, option, env_id, task)

    chosen = [method, page.policy, task]
    method.change(show_method, chosen, list(fields.values()), **_QUIET, queue=False)
    stretch = fields["adapt_every"]
    gr.on([task.change, page.policy.change], show_stretch, chosen, stretch, **_QUIET, queue=False)
    _bind(
        page,
        _Panel(start, stop, status),
        adapting.KIND,
        adapt,
        [page.policy, method, task, *fields.values()],
        show,
        [curve, table, take, adapted],
        at_once=2,
    )
    take.click(lambda name: name, adapted, page.policy, **_QUIET, queue=False)
    return method, task


def _watch_tab(page: _Page) -> tuple[gr.Dropdown, gr.Video, gr.HTML]:
    with gr.Row():
        with gr.Column(scale=2, min_width=320):
            task = gr.Dropdown(
                [("as it was trained", adapting.USUAL_TASK)],
                value=adapting.USUAL_TASK,
                label="Task",
                elem_id="watch-task",
            )
            most = watching.STEPS
            steps = gr.Slider(50, most.at_most, 300, step=50, label=most.label)
            seed = gr.Number(0, label=SEED.label)
            deterministic = gr.Checkbox(True, label="Most likely actions, no exploration")
            start, stop = _buttons("Watch")
        with gr.Column(scale=3, min_width=400):
            status = _status_line(_NO_FILM)
            video = gr.Video(
                label="Episode", autoplay=True, loop=True, interactive=False, height=400
            )

    def show(view: watching.WatchView) -> Components:
        return [view.video]

    _bind(
        page,
        _Panel(start, stop, status),
        watching.KIND,
        watching.watch,
        [page.policy, task, steps, seed, deterministic],
        show,
        [video],
        at_once=2,
    )
    return task, video, status


def _kernels_tab(page: _Page) -> None:
    processors = os.cpu_count() or 1
    with gr.Row():
        batch = gr.Dropdown(list(kernels.BATCHES), value=16, label="Batch B")
        steps = gr.Dropdown(list(kernels.STEPS), value=64, label="Steps T")
        state = gr.Dropdown(list(kernels.STATES), value=64, label="State and features N")
        threads = gr.Slider(1, max(processors, 2), 1, step=1, label="Threads")
    start, stop = _buttons("Measure")
    status = _status_line("Times of this machine. Other work on it makes them longer.")
    table = gr.Dataframe(
        headers=[
            "",
            "native, ms",
            "eager loop, ms",
            "nn.GRU, ms",
            "eager / native",
            "GRU / native",
        ],
        datatype=["str", "number", "number", "number", "number", "number"],
        interactive=False,
        show_label=False,
        row_count=1,
    )

    def show(view: kernels.KernelsView) -> Components:
        return [[_cells(row) for row in view.rows] or None]

    _bind(
        page,
        _Panel(start, stop, status),
        kernels.KIND,
        kernels.measure,
        [batch, steps, state, threads],
        show,
        [table],
        at_once=1,
    )


def _cells(row: kernels.Row) -> list[Any]:
    ratios = [None if x is None else round(x / row.native, 1) for x in (row.eager, row.gru)]
    times = [None if x is None else round(x, 3) for x in (row.native, row.eager, row.gru)]
    return [row.what, *times, *ratios]


# What the tabs have in common

_QUIET: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}


def _bind(
    page: _Page,
    panel: _Panel,
    kind: str,
    handler: Callable[..., Iterator[V]],
    inputs: Components,
    show: Callable[[V], Components],
    outputs: Components,
    at_once: int,
) -> None:
    """Has a panel start and stop a handler, which shows its views in the outputs.

    Args:
        page: What the tabs share.
        panel: Of the tab.
        kind: Of the work.
        handler: Takes the visitor and the values of the inputs.
        inputs: Components.
        show: The values of the outputs from a view.
        outputs: Components, beside those of the panel.
        at_once: How many visitors may have such work under way; others wait in the queue.
    """
    buttons = [panel.start, panel.stop, panel.status, page.would_lose]

    def announce(request: gr.Request) -> Components:
        _visitor(page.visitors, request).announce(kind)
        waiting = as_html(Status("Waiting for its turn ...", "busy"))
        return [gr.Button(interactive=False), gr.Button(interactive=True), waiting, _WOULD_LOSE]

    def run(request: gr.Request, *values: Any) -> Iterator[Components]:
        visitor = _visitor(page.visitors, request)
        for view in handler(visitor, *values):
            shown = [as_html(view.status), gr.skip(), _choices(visitor, view), *show(view)]
            yield [gr.skip(), gr.skip(), *shown]
        kept = [gr.skip()] * (len(outputs) + 1)
        yield [
            *(gr.Button(interactive=True), gr.Button(interactive=False)),
            *(gr.skip(), _lost(visitor), *kept),
        ]

    def fail(request: gr.Request) -> Components:
        text = (
            "Too many are waiting, or this page is older than the server: try again, or reload it."
        )
        status, lost = as_html(Status(text, "error")), _lost(_visitor(page.visitors, request))
        return [gr.Button(interactive=True), gr.Button(interactive=False), status, lost]

    def stop(request: gr.Request) -> Any:
        if _visitor(page.visitors, request).stop(kind):
            return gr.skip()
        return as_html(Status("Stopped: it will not begin when its turn comes.", "busy"))

    started = panel.start.click(announce, None, buttons, **_QUIET, queue=False).then(
        run,
        inputs,
        [*buttons, page.policy, *outputs],
        **_QUIET,
        concurrency_limit=at_once,
        concurrency_id=kind,
    )
    started.failure(fail, None, buttons, **_QUIET, queue=False)
    panel.stop.click(stop, None, panel.status, **_QUIET, queue=False)
    changed = [component.input for component in inputs if component is not page.policy]
    _clear_error(panel.status, [*changed, page.policy.change])


def _clear_error(status: gr.HTML, changed: Sequence[Any]) -> None:
    """Has an error go where what it was about changes."""
    idle = json.dumps(status.value)
    js = f"(shown) => {IS_ERROR}.test(shown) ? {idle} : shown"
    gr.on(changed, None, status, status, js=js, **_QUIET)


def _visitor(visitors: Visitors, request: gr.Request) -> Visitor:
    if not request.session_hash:  # all such requests would be one visitor
        raise gr.Error("The request belongs to no session.")
    return visitors.of(request.session_hash)


def _leave(visitors: Visitors) -> Callable[[gr.Request], None]:
    def leave(request: gr.Request) -> None:
        visitors.leave(str(request.session_hash))

    return leave


def _option_fields(
    options: Mapping[str, Count | Fraction], default_of: Callable[[str], float | None]
) -> dict[str, gr.Number]:
    """A field for each option, with its default; hidden where there is none."""
    with gr.Row():
        return {
            name: gr.Number(
                default_of(name),
                label=option.label,
                visible=default_of(name) is not None,
                min_width=140,
            )
            for name, option in options.items()
        }


def _default(value: float | None) -> Any:
    """An option's field as another mode or method has it."""
    return gr.Number(visible=False) if value is None else gr.Number(value, visible=True)


def _buttons(label: str) -> tuple[gr.Button, gr.Button]:
    with gr.Row():
        start = gr.Button(label, variant="primary", elem_id=f"{label.lower()}-start")
        stop = gr.Button("Stop", variant="stop", interactive=False, elem_id=f"{label.lower()}-stop")
    return start, stop


def _status_line(text: str) -> gr.HTML:
    return gr.HTML(as_html(Status(text)), elem_classes="line")


def _choices(visitor: Visitor, view: View) -> Any:
    """The dropdown of the policies, where there is a new one; an adapted one is not yet in hand."""
    new = getattr(view, "policy", None)
    if new is not None:
        return gr.Dropdown(list(visitor.policies), value=new)
    if getattr(view, "adapted", None) is not None:
        return gr.Dropdown(list(visitor.policies))
    return gr.skip()


def _lost(visitor: Visitor) -> str:
    """What `JS` looks for."""
    return _WOULD_LOSE if visitor.would_lose else ""


def _frame(points: Sequence[tuple[Any, ...]], columns: list[str]) -> pd.DataFrame | None:
    return pd.DataFrame(points, columns=columns) if points else None
