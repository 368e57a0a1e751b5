"""What SGLang's registry scans for model classes."""
