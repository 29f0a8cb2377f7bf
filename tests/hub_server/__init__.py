"""A local Hub for tests: speaks the Hub's HTTP API to the real ``huggingface_hub`` client, with faults on demand."""

from .clients import client_environment, run_client
from .faults import Fault
from .server import HubServer
from .store import Refused, Store

__all__ = ["Fault", "HubServer", "Refused", "Store", "client_environment", "run_client"]
