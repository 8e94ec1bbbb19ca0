"""The service's metrics, collected when somebody asks.

collect.py      this process's counts as families
publisher.py    those of all worker processes
exposition.py   families as Prometheus reads them
summary.py      families as a person or the page reads them, for one policy
"""
