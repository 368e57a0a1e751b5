"""The package that SGLang scans for the classes that prepare a request's media."""
