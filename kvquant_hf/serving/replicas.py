"""Several servers behind one address, on one machine or many: Ray Serve starts them and hands requests out."""

import logging
import os
import signal
import threading
from collections.abc import Callable
from typing import Any

import ray
import torch
from ray import serve

from .application import Application

_NAME = "kvquant"
# Ray's own 5 s are not enough where its proxy starts beside other work: it is killed, and with it the start.
_STARTING = {"RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60"}
# Ray would hold requests back that a server can queue, or refuse, by itself: its gate knows when there is room.
_AT_ONCE = 100_000


def run_replicas(
    build: Callable[[], Application], replicas: int, host: str, port: int, ready: Callable[[], object]
) -> None:
    """Serve until SIGINT or SIGTERM.

    Args:
        build: makes an application, in the process of each replica, so what it closes over must be picklable.
        replicas: how many.  Each has a model and a budget of its own, and a GPU of its own where there are any.
        host: where to listen.
        port: a number; 0 is not for Ray.
        ready: called when all answer.

    Raises:
        RuntimeError: a replica cannot be built; the first line of why.
    """
    ended = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *args: ended.set())
    for name in ("ray", "ray.serve"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for setting, value in _STARTING.items():
        os.environ.setdefault(setting, value)
    # A cluster that RAY_ADDRESS names, or one of this machine alone.
    ray.init(include_dashboard=False, log_to_driver=False, configure_logging=False, ignore_reinit_error=True)
    try:
        serve.start(http_options={"host": host, "port": port}, logging_config={"log_level": "ERROR"})
        resources = {"num_cpus": 1, "num_gpus": int(torch.cuda.is_available())}
        deployment: Any = serve.deployment(
            _replica(build),
            name=_NAME,
            num_replicas=replicas,
            ray_actor_options=resources,
            max_ongoing_requests=_AT_ONCE,
        )
        serve.run(deployment.bind(), name=_NAME, route_prefix="/")
        ready()
        ended.wait()
    finally:
        serve.shutdown()
        ray.shutdown()


def _replica(build: Callable[[], Application]) -> Any:
    """The class of replicas, which Ray sends to where they run."""

    def application() -> Application:
        app = build()
        app.replica = serve.get_replica_context().replica_id.unique_id
        return app

    @serve.ingress(application)
    class Replica:
        """One server."""

    return Replica
