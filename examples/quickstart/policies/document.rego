package myapp.GET.documents.__id

default allowed := false

allowed if input.identity.identity == "alice"
