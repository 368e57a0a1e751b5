"""The package that SGLang's registry scans for model classes."""
