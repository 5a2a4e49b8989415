"""What plugs dtrain into other people's programs: launchers and training frameworks.

One module or package for each program. It may use everything of dtrain and is
used by nothing of it, and it imports the program that it plugs into: nobody
pays for an integration that they do not import. Nothing stands in this file,
so that one integration does not load the others.
"""
