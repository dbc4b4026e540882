"""A worker that answers at once: what a message costs.  A request is {"n_events", "data"}."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from mmchat.child import Handler


def serve(config: dict[str, Any]) -> tuple[dict[str, Any], Handler]:
    def handle(request: dict[str, Any], should_stop: Callable[[], bool]) -> Iterator[dict[str, Any]]:
        for number in range(request["n_events"]):
            yield {"kind": "token", "id": number, "text": "word "}

    return {}, handle
