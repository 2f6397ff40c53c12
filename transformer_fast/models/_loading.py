class LoadingErrors:
    pass
