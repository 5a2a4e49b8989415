"""Webhooks: events of jobs, told to people's own receivers by the leader.

``settings`` reads the file that names them, ``message`` is what is sent, ``sender`` sends it, in a thread
for each webhook. The events in etcd are the outbox; a cursor beside them says how far each webhook has got.
"""
