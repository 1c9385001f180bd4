"""The manager: an actor beside the head of Ray that lists nodes, and adds agents for machines."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Any

from headrace import runtime
from headrace.cluster import secure
from headrace.cluster.directory import ray_directory
from headrace.cluster.listing import ListingServer
from headrace.cluster.wire import Address, Placed
from headrace.ray_cluster.agent import (
    APPLICATION,
    RESOURCE,
    Agent,
    Plan,
    RayFailure,
    Report,
    ray_errors,
)

log = logging.getLogger("headrace.cluster")

_EVERY_S = 2.0
_SILENT_S = 15.0
_FORGET_S = 600.0


class Manager:
    """Lists what agents report, and keeps as many agents as there are machines for nodes.

    All that it needs to begin anew is the plan: agents report once a second.
    """

    async def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._cluster = (
            await asyncio.to_thread(runtime.load_settings, file=plan.file)
        ).config.cluster
        self._reports: dict[str, tuple[float, Report]] = {}
        self._machines: dict[str, str] | None = None
        self._agents = -1
        self._is_wanted = True
        self._tasks = [asyncio.create_task(self._serve()), asyncio.create_task(self._reconcile())]

    async def report(self, report: Report) -> bool:
        """Take what an agent reports; return whether there is to be a node."""
        self._reports[report.machine] = time.monotonic(), report
        return self._is_wanted

    async def end(self) -> None:
        """Let all agents end their nodes."""
        self._is_wanted = False

    async def nodes(self) -> tuple[Placed, ...]:
        """Return the nodes, also those that are still to come."""
        return self.placed()

    def placed(self) -> tuple[Placed, ...]:
        """Return the nodes, also those to come; none before Ray has listed its machines."""
        now = time.monotonic()
        if self._machines is None:
            return ()
        for machine, (reported, _) in [*self._reports.items()]:
            if machine not in self._machines and now - reported > _FORGET_S:
                del self._reports[machine]
        known = {
            machine: self._state(now - reported, report, machine in self._machines)
            for machine, (reported, report) in self._reports.items()
        }
        port = self._cluster.wire_port
        for machine, host in self._machines.items():
            known.setdefault(machine, Placed(host, str(Address(host, port)), "no agent yet"))
        return tuple(known.values())

    def _state(self, silent_s: float, report: Report, is_machine: bool) -> Placed:
        node, address, state, reason = report.placed.node, report.placed.address, "", ""
        if not is_machine:
            state, reason = "left alone", "Ray has lost its machine"
        elif silent_s > _SILENT_S:
            state, reason = "left alone", f"no report of its agent for {silent_s:.0f} s"
        elif report.digest != self._plan.digest and self._is_wanted:
            state, reason = "waiting", "it gets the new configuration in its turn"
        return Placed(node, address, state, reason) if state else report.placed

    async def _serve(self) -> None:
        """Answer fronts, once the port is free."""
        member = secure.member(self._cluster)
        host = ray_directory(self._cluster).host
        secure.demand(member.access, host)
        server = ListingServer(member, self.placed)
        while True:
            try:
                listener = secure.listen_at(host, self._cluster.ray_port, member.access)
            except OSError as error:
                data = {"name": f"{host}:{self._cluster.ray_port}", "error": str(error)}
                log.warning("headrace.cluster.lookup_failed", extra={"data": data})
                await asyncio.sleep(_EVERY_S)
                continue
            with listener:
                await server.serve(listener)

    async def _reconcile(self) -> None:
        while True:
            try:
                self._machines = await asyncio.to_thread(_machines)
                # Not fewer when a machine is gone: its agent waits for it. Serve would end an agent
                # that waits, and Ray then may not give its resource to another.
                agents = max(1, self._agents, len(self._machines))
                if agents != self._agents and self._is_wanted:
                    await asyncio.to_thread(_deploy, self._plan, agents)
                    self._agents = agents
            except RayFailure as error:
                log.warning(
                    "headrace.cluster.not_reconciled", extra={"data": {"error": str(error)}}
                )
            await asyncio.sleep(_EVERY_S)


def _machines() -> dict[str, str]:
    """Return the addresses of the machines on which nodes are to be, by Ray's ids."""
    import ray

    with ray_errors():
        return {
            node["NodeID"]: node["NodeManagerAddress"]
            for node in ray.nodes()
            if node["Alive"] and node["Resources"].get(RESOURCE)
        }


def _deploy(plan: Plan, agents: int) -> None:
    """Let Serve have so many agents. Those whose plan is another are replaced one after another."""
    from ray import serve

    with ray_errors():
        deployment: Any = serve.deployment(
            Agent,
            name="node",
            num_replicas=agents,
            max_replicas_per_node=1,
            ray_actor_options={"num_cpus": 0, "resources": {RESOURCE: 1}},
            health_check_period_s=5,
            graceful_shutdown_timeout_s=1,
        )
        # Else each call is a new version for Serve, and all agents are replaced for nothing.
        vars(deployment)["_version"] = f"{plan.version}-{plan.digest}"
        serve.start(proxy_location="Disabled")
        serve.run_many(
            [serve.RunTarget(deployment.bind(plan), name=APPLICATION, route_prefix=None)],
            wait_for_ingress_deployment_creation=False,
            wait_for_applications_running=False,
        )
