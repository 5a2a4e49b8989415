"""What clients can ask of any replica, over gRPC.

``servicers.py`` answers from the mirror and writes operators' records;
``errors.py`` translates the error tree; ``validate.py`` says what a job may
look like; ``server.py`` holds ports and pools. Nothing here leads.
"""
