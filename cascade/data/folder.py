class Folder:
    pass
