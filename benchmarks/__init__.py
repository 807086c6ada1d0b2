"""Measurements that anyone can run again, with the results that we got."""
