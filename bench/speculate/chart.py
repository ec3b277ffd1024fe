def write_chart(records, path):
    raise NotImplementedError
