"""An ingestion on a two-node Ray cluster whose second node dies, in a process of its own: Ray connects a process once.

Usage: two_nodes.py JOB.json ; the job names sources, corpus, vocabulary, unit_nonzeros and `kill_at`: with more part
files than that below the corpus, the second node's raylet is ended with SIGKILL. Prints the report as JSON.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from genescale.platform.cluster import quiet_environment


def end_node(job: dict[str, Any], node: Any, done: threading.Event) -> None:
    (raylet,) = node.all_processes["raylet"]
    while not done.is_set():
        if len(list(Path(job["corpus"]).rglob("*.parquet"))) > job["kill_at"]:
            os.kill(raylet.process.pid, signal.SIGKILL)
            return
        time.sleep(0.005)


def main(job: dict[str, Any], temp_dir: str) -> None:
    quiet_environment()
    import ray
    from ray.cluster_utils import Cluster

    from genescale.ingestion.pipeline import IngestConfig, ingest
    from genescale.platform.cluster import ray_cluster
    from genescale.platform.settings import ClusterSettings, Settings
    from genescale.platform.storage import Store
    from genescale.platform.vocabulary import read_vocabulary

    settings, done = Settings(), threading.Event()
    store = Store(settings.storage)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "temp_dir": temp_dir})
    try:
        second = cluster.add_node(num_cpus=1)
        with ray_cluster(Settings(cluster=ClusterSettings(address=cluster.address))):
            assert len([node for node in ray.nodes() if node["Alive"]]) == 2
            killer = threading.Thread(target=end_node, args=(job, second, done))
            killer.start()
            report = ingest(
                job["sources"],
                job["corpus"],
                vocabulary=read_vocabulary(job["vocabulary"], store),
                store=store,
                config=IngestConfig(unit_nonzeros=job["unit_nonzeros"]),
            )
            done.set()
            killer.join()
            # The head learns of the death with a delay, so that what the test checks is the process itself.
            (raylet,) = second.all_processes["raylet"]
            print(json.dumps({"ended": raylet.process.poll(), "report": report.to_dict()}))
    finally:
        done.set()
        cluster.shutdown()


if __name__ == "__main__":
    # Ray's sockets stand below this folder, and the path of a socket is short.
    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp", ignore_cleanup_errors=True) as folder:
        main(json.loads(Path(sys.argv[1]).read_text()), folder)
