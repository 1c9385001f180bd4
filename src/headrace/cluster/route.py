"""Route: which nodes may answer a request, one after the other."""

from __future__ import annotations

from headrace.cluster.view import Node, View
from headrace.core.errors import (
    Disabled,
    DoesNotFit,
    Draining,
    HeadraceError,
    LoadFailed,
    NodeGone,
    NoNode,
    QueueFull,
    UnknownModel,
)
from headrace.core.model import Capabilities
from headrace.core.request import AnyRequest
from headrace.pool.policy import blocks_of

_RETRY_AFTER_S = 2.0
_MAX_REFUSALS = 3
_ELSEWHERE = (Draining, Disabled, DoesNotFit, LoadFailed, QueueFull, UnknownModel)
"""Errors of one node, before it has begun, which another may not have."""


class Route:
    """The nodes for one request: `next` chooses one, `failed` decides whether there is a next.

    Raises:
        UnknownModel: no node serves the model.
        NoNode: no node is there.
    """

    def __init__(self, view: View, request: AnyRequest) -> None:
        self._view = view
        self._name = request.model
        self.model = self._model(request.model)
        self.status = self._view.known[self.model]
        self.excluded: set[Node] = set()
        self.blocks = blocks_of(request) if request.queues else ()
        self._first_error: HeadraceError | None = None
        self._refusals = 0

    @property
    def capabilities(self) -> Capabilities:
        """Those of the model, as a node has reported them."""
        for node in self._view.having(self.model):
            infos = node.models[self.model].infos
            if infos and infos[0].state == "ready":
                return infos[0].capabilities
        return Capabilities(resume=True)

    @property
    def has_next(self) -> bool:
        """Whether there is a node for the next attempt."""
        return self._choose() is not None

    def next(self) -> Node:
        """Return the node for the next attempt.

        Raises:
            NoNode: there is none.
            HeadraceError: the first error of a node, if there has been one.
        """
        if (node := self._choose()) is not None:
            return node
        if (error := self._take_error()) is not None:
            raise error
        raise self._no_node()

    def failed(self, node: Node, error: HeadraceError, *, has_begun: bool) -> None:
        """Exclude a node that has refused the request.

        Raises:
            HeadraceError: the error, if no other node may be tried.
        """
        self.excluded.add(node)
        try:
            if isinstance(error, NodeGone) and not has_begun:
                return
            self._refusals += 1
            if isinstance(error, UnknownModel):
                # A preset or an adapter that was added, which a new node does not have.
                self.excluded.update(self._view.lacking(self.model, self._name))
            if has_begun or not isinstance(error, _ELSEWHERE) or self._refusals >= _MAX_REFUSALS:
                raise error
            if isinstance(error, QueueFull) and not self._others():
                raise error
            self._first_error = self._first_error or error
        finally:
            del error  # its traceback has this frame: that would be a reference cycle

    def _choose(self) -> Node | None:
        return self._view.choose(self.model, self.blocks, self.excluded)

    def _others(self) -> bool:
        """Whether another node has loaded the model."""
        return any(node not in self.excluded for node in self._view.ready(self.model))

    def _take_error(self) -> HeadraceError | None:
        error, self._first_error = self._first_error, None
        return error

    def _model(self, name: str) -> str:
        if (model := self._view.model_of(name)) is not None:
            return model
        if not self._view.nodes:
            raise self._no_node()
        served = ", ".join(sorted(self._view.names))
        raise UnknownModel(
            f"The model {name!r} is not served here; there is {served}.", param="model"
        )

    def _no_node(self) -> NoNode:
        why = "No node of the cluster takes requests now."
        if self._view.nodes:
            why = "No node that has this model takes requests now."
        return NoNode(why, retry_after_s=_RETRY_AFTER_S)
