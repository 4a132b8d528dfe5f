"""The rules of the papers, one file each: functions from sizes to one list of compute actions per rank."""
