"""The Prometheus metrics of the service.

Begin with `table`: every metric with its name, help text and labels (`kv_table` has the part about
tokens and KV pages). `service` makes those that are counted while requests are served, from the
plain numbers in `instruments`; those that are read at a scrape are in the collectors of `admin`.
To add a metric, add it to the table and make it in one of these two places, then run `make docs`.
"""

__all__ = ["discovery_table", "instruments", "kv_table", "service", "specs", "table"]
