"""The metrics of the service.

collect.py      the counts of this process -> families
publisher.py    the families of all worker processes
exposition.py   families -> the text that Prometheus scrapes
summary.py      families -> the main numbers of one policy, as JSON
"""
