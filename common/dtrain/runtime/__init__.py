"""What every daemon needs to run, without knowing what dtrain is about.

Clock, retry, configuration, logging, threads and their end. No domain: a
change of the job model never touches this package.
"""
